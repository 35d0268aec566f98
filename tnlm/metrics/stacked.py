"""The metric of matrices stacked vertically, each with its own metric."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.metrics.several import Several
from tnlm.metrics.sides import DAMPING, Side

UNSEEN = 1e-9
"""Weight of a member whose errors do not count, relative to the largest."""


class Stacked(Metric):
    """The sum of the squared norms of the members, ``sum of ||G_s^(1/2) E_s C_s^(1/2)||^2``.

    It is separable only if all members have the same inputs. A fit starts from the pooled sides,
    the partial traces of the whole form: C is the mean of all C_s weighted by the traces of G_s,
    and G_s is multiplied by the mean of C_s.

    Args:
        members: separable metrics without a mean, one for each block of rows.
        rows: number of rows of each member.

    Raises:
        OptionError: if a member is not separable, or has a mean.

    Source: the pooling is the nearest Kronecker product by partial traces, as in K-FAC (Martens and
    Grosse 2015); multilinear whitening of stacked experts as in TD-MoE.

    Example:
        >>> quiet, loud = (Metric(inputs=Side(torch.tensor([c, c]))) for c in (1.0, 4.0))
        >>> metric = Stacked([quiet, loud], rows=[1, 1])
        >>> metric.norm(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        5.0
    """

    separable = False

    def __init__(self, members: Sequence[Metric], rows: Sequence[int]) -> None:
        """Store the members; see the class for the arguments."""
        super().__init__()
        for member in members:
            if not member.separable or member.mean is not None:
                raise OptionError(
                    f"a {type(member).__name__} in a stack; allowed: separable metrics that add no "
                    "bias"
                )
        self.members, self.rows = tuple(members), tuple(rows)

    @classmethod
    def of(cls, several: Several, rows: int) -> Stacked:
        """Return the metric of several matrices of ``rows`` rows, one below the other."""
        parts = [part() for part in several.parts]
        weights = [_weight(part) * s for part, s in zip(parts, several.scales, strict=True)]
        least = UNSEEN * max(weights)
        found = [
            scaled(part, scale, rows) if weight > least else _even(least, rows)
            for part, scale, weight in zip(parts, several.scales, weights, strict=True)
        ]
        return cls(found, [rows] * len(found))

    @property
    def is_plain(self) -> bool:
        """Whether no member has a side, so that this is the Frobenius norm."""
        return all(member.outputs is None and member.inputs is None for member in self.members)

    def pull(self, error: Tensor) -> Tensor:
        """Return ``G_s E_s C_s`` of all members, stacked."""
        return torch.cat([member.pull(part) for member, part in self._parts(error)])

    def whiten(self, weight: Tensor) -> Tensor:
        """Return ``G_s^(1/2) W_s C_s^(1/2)`` of all members, stacked."""
        return torch.cat([member.whiten(part) for member, part in self._parts(weight)])

    def start(self) -> Metric:
        """Return the metric of the pooled sides; G is block-diagonal over the members."""
        if self.is_plain:
            return Metric()
        outputs = [_outputs(m, rows) for m, rows in zip(self.members, self.rows, strict=True)]
        return Metric(Side(_block_diagonal(outputs)), self._inputs())

    def modes(self, out_split: Sequence[int], in_split: Sequence[int]) -> list[Side | None]:
        """Return the side of every mode; for outputs split into slices, from small blocks."""
        slices = [rows // out_split[-1] for rows in self.rows]
        even = all(n * out_split[-1] == rows for n, rows in zip(slices, self.rows, strict=True))
        if len(out_split) != 2 or not even or self.is_plain:
            return super().modes(out_split, in_split)
        outer, inner = [], []
        for member, count, rows in zip(self.members, slices, self.rows, strict=True):
            scale, within = Side(_outputs(member, rows)).modes((count, out_split[1]))
            outer.append(scale.values)
            inner.append(within.values * scale.mean * count)
        sides = [_block_diagonal(outer), _sum(inner)]
        pooled: list[Side | None] = [Side(values, DAMPING) for values in sides]
        pooled[1] = Side(sides[1] / Side(sides[1]).mean, DAMPING)
        return pooled + Metric(inputs=self._inputs()).modes((1,), in_split)[1:]

    def _parts(self, tall: Tensor) -> Iterator[tuple[Metric, Tensor]]:
        return zip(self.members, tall.split(self.rows), strict=True)

    def _inputs(self) -> Side | None:
        """Return the pooled side of the inputs, with mean 1."""
        sides = [member.inputs for member in self.members]
        first = sides[0]
        if all(side is first for side in sides):
            return None if first is None else Side(first.values / first.mean)
        size = next(len(side.values) for side in sides if side is not None)
        weighed = [
            (torch.ones(size).double() if m.inputs is None else m.inputs.values)
            * (rows * (1.0 if m.outputs is None else m.outputs.mean))
            for m, rows in zip(self.members, self.rows, strict=True)
        ]
        pooled = Side(_sum(weighed))
        return Side(pooled.values / pooled.mean)


def _weight(member: Metric) -> float:
    """Return the mean weight of the entries of a matrix."""
    return math.prod(side.mean for side in (member.outputs, member.inputs) if side is not None)


def scaled(member: Metric, scale: float, rows: int) -> Metric:
    """Return a metric of matrices with so many rows, its squared norm ``scale`` times as large.

    Example:
        >>> scaled(Metric(), 4.0, rows=1).norm(torch.tensor([[3.0]]))
        6.0
    """
    if scale == 1.0:
        return member
    if member.outputs is not None:
        return Metric(member.outputs.times(scale), member.inputs, member.mean)
    if member.inputs is not None:
        return Metric(None, member.inputs.times(scale), member.mean)
    return _even(scale, rows)


def _even(weight: float, rows: int) -> Metric:
    return Metric(Side(torch.full((rows,), weight)))


def _outputs(member: Metric, rows: int) -> Tensor:
    """Return a member's output side, times the mean of its input side."""
    scale = 1.0 if member.inputs is None else member.inputs.mean
    if member.outputs is None:
        return torch.full((rows,), scale, dtype=torch.float64)
    return member.outputs.values * scale


def _block_diagonal(parts: Sequence[Tensor]) -> Tensor:
    if all(part.dim() == 1 for part in parts):
        return torch.cat(list(parts))
    blocks: Tensor = torch.block_diag(*map(_full, parts))
    return blocks


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of sides of one size, full or diagonal."""
    if any(part.dim() == 2 for part in parts):
        parts = [_full(part) for part in parts]
    return torch.stack(list(parts)).sum(0)


def _full(part: Tensor) -> Tensor:
    return part.diag() if part.dim() == 1 else part
