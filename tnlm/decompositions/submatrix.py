"""Submatrix: some rows and columns of a matrix are kept and updated, the others are zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.base import FIXED, QUIET, Ceiling, Format, Shape, matrix_shape
from tnlm.decompositions.surgery import as_order, remaining, removal_losses
from tnlm.errors import OptionError, RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.named.surgery import Operated
from tnlm.metrics.sides import Side
from tnlm.tensors.gauge import ORDER
from tnlm.tensors.network import Factors, Network
from tnlm.utils.ties import greatest

SHOTS = 5
"""Default number of steps in which LLM Surgeon removes rows and columns."""


@dataclass(frozen=True)
class SubmatrixSpec:
    """The numbers of rows and columns to keep, and the steps in which the others are removed."""

    rows: int = field(metadata=FIXED)
    columns: int = field(metadata=FIXED)
    shots: int = field(default=SHOTS, metadata={**QUIET, "metric": "surgery"})


class Submatrix(Format[SubmatrixSpec]):
    """Keep the rows and columns whose removal would cost the most, updated for the others.

    The layer reads only the kept columns' inputs and gives zeros in place of the other rows. Under
    the metric ``surgery``, LLM Surgeon has chosen the rows and columns of all matrices together;
    under any other, those of least loss are removed from each matrix in one step.

    Source: LLM Surgeon, van der Ouderaa et al. 2024, arXiv 2312.17244.

    Example:
        >>> weight = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
        >>> spec = SubmatrixSpec(rows=2, columns=2)
        >>> FORMAT.reconstruct((3, 3), spec, FORMAT.fit(weight, Metric(), spec)).diagonal()
        tensor([3., 0., 2.], dtype=torch.float64)
    """

    name = "submatrix"
    title = "some rows and columns, updated for the others"
    spec = SubmatrixSpec
    metrics = frozenset({"separable", "surgery"})
    kinds = frozenset({"submatrix"})

    def network(self, shape: Shape, spec: SubmatrixSpec) -> Network:
        """Return the one factor of kept rows and columns."""
        for name, size in zip(("rows", "columns"), shape, strict=True):
            if getattr(spec, name) > size:
                raise RankError(
                    f"{name}={getattr(spec, name)}; a {shape[0]}x{shape[1]} matrix allows 1 to "
                    f"{size}",
                    argument=name,
                )
        sizes = {"o": spec.rows, "i": spec.columns}
        return Network({"core": "oi"}, "o", "i", sizes, indices=sum(shape))

    def fit(self, weight: Tensor, metric: Metric, spec: SubmatrixSpec) -> Factors:
        """Return ``core``, and the orders in which rows and columns start with the kept ones."""
        weight = weight.detach().double()
        if isinstance(metric, Operated):
            rows, columns, core = metric.rows, metric.columns, metric.core.double()
            if core.shape != (spec.rows, spec.columns):
                raise OptionError(
                    f"rows={spec.rows}, columns={spec.columns}; allowed: {len(rows)} and "
                    f"{len(columns)}, which were chosen for all matrices together on this data; "
                    "carry out a plan unchanged and with the data that it was made with",
                    argument=("rows", "columns"),
                )
        else:
            sides = sides_of(metric, weight)
            by_row, by_column = removal_losses(weight, *sides)
            rows = greatest(by_row, spec.rows).sort().values
            columns = greatest(by_column, spec.columns).sort().values
            core = remaining(weight, *sides, rows, columns)
        return {
            "core": core,
            "rows" + ORDER: as_order(rows, weight.shape[0]),
            "columns" + ORDER: as_order(columns, weight.shape[1]),
        }

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[SubmatrixSpec]:
        """Return the most rows, the most columns, and the same fraction of both."""
        out, inp = shape
        most = int(min(ceiling.params, ceiling.macs, out * inp))
        even = math.floor(out * math.sqrt(most / (out * inp))) or 1
        sizes = [(out, most // out), (most // inp, inp), (even, min(most // even, inp))]
        specs = [SubmatrixSpec(*size) for size in dict.fromkeys(sizes) if min(size) >= 1]
        return [spec for spec in specs if ceiling.allows(self.network(shape, spec))]

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[SubmatrixSpec]:
        """Return the fewest rows, and the fewest columns, whose error is within the tolerance."""
        out, inp = matrix_shape(weight)

        def fewest(size: int, by_rows: bool) -> SubmatrixSpec:
            low, high = 1, size
            while low < high:
                middle = (low + high) // 2
                spec = SubmatrixSpec(middle, inp) if by_rows else SubmatrixSpec(out, middle)
                good = self.errors(weight, metric, [spec])[0] <= tolerance
                low, high = (low, middle) if good else (middle + 1, high)
            return SubmatrixSpec(low, inp) if by_rows else SubmatrixSpec(out, low)

        return [fewest(out, True), fewest(inp, False)]

    def reconstruct(self, shape: Shape, spec: SubmatrixSpec, factors: Factors) -> Tensor:
        """Return the ``(out, in)`` matrix, with zeros for what was removed."""
        table = factors["core"].new_zeros(shape)
        rows = factors["rows" + ORDER][: spec.rows]
        columns = factors["columns" + ORDER][: spec.columns]
        table[rows[:, None], columns] = factors["core"]
        return table


def sides_of(metric: Metric, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sides of a metric as full matrices, for an ``(out, in)`` weight."""
    near, (out, inp) = metric.start(), weight.shape
    return _full(near.outputs, out, weight.device), _full(near.inputs, inp, weight.device)


def _full(side: Side | None, size: int, device: torch.device) -> Tensor:
    if side is None:
        return torch.eye(size, dtype=torch.float64, device=device)
    return side.values.diag() if side.is_diagonal else side.values


FORMAT = Submatrix()
