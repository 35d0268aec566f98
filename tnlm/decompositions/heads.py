"""Heads: attention keeps some of its key/value heads, with all query heads that share them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.base import FIXED, Ceiling, Format, Shape
from tnlm.decompositions.nystrom import moment_of, refitted, weighted
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.network import Factors, Network
from tnlm.utils.ties import greatest

FLOOR = 1e-10
"""Ridge of a head's block, as a share of the mean moment; what others predict better is noise."""


@dataclass(frozen=True)
class HeadsSpec:
    """The number of key/value heads to keep, each with ``size`` outputs of its query heads."""

    heads: int
    size: int = field(metadata=FIXED)


class Heads(Format[HeadsSpec]):
    """Keep the heads that best predict the contribution of the others (Nyström).

    The matrix is the transposed output projection, ``(hidden, out)``, whose rows come in groups:
    one for each key/value head, with all query heads that share it. The metric's row side is the
    second moment C of what heads return, its column side that of the output gradients, G. With K
    the rows of the heads kept, the new projection is ``W C[:, K] C[K, K]^-1``. Heads are chosen
    greedily, each time the one that reduces the error most, given those already chosen.

    The queries, keys and values of the other heads are removed with them, so that all layers stay
    plain and the cache of keys and values shrinks.

    Source: the rule of ``channels`` for groups of rows (block orthogonal least squares); that whole
    heads can be removed is shown by Michel, Levy and Neubig (arXiv 1905.10650).

    Example:
        >>> from tnlm.metrics.sides import Side
        >>> moment = torch.ones(2, 2).kron(torch.eye(3))  # two heads of three that always agree
        >>> weight = torch.randn(6, 5)
        >>> factors = FORMAT.fit(weight, Metric(outputs=Side(moment)), HeadsSpec(1, size=3))
        >>> wanted = weight[:3].double() + weight[3:].double()
        >>> bool(torch.allclose(factors["rows"], wanted))
        True
    """

    name = "heads"
    title = "fewer heads of attention (Nyström)"
    spec = HeadsSpec
    metrics = frozenset({"separable"})
    kinds = frozenset({"heads"})
    made_of = frozenset({"linear"})

    def network(self, shape: Shape, spec: HeadsSpec) -> Network:
        """Return the single factor of kept rows; the layers that use it are plain."""
        count, rest = divmod(shape[0], spec.size)
        if rest or not 1 <= spec.heads <= count:
            raise RankError(
                f"heads={spec.heads}; {shape[0]} values allow 1 to {count} heads of {spec.size}",
                argument="heads",
            )
        return Network({"rows": "ko"}, "k", "o", {"k": spec.heads * spec.size, "o": shape[1]})

    def fit(self, weight: Tensor, metric: Metric, spec: HeadsSpec) -> Factors:
        """Return ``kept``, the sorted indices of heads, and ``rows``, their new projection."""
        chosen, _ = _order(weight, metric, spec.size, spec.heads)
        kept = chosen[: spec.heads].sort().values
        rows = _rows(kept, spec.size)
        return {"kept": kept, "rows": refitted(weight, moment_of(weight, metric), rows)}

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[HeadsSpec]:
        """Return the given number of heads, or the largest within the budget for the rows."""
        size = options.get("size", 1)
        most = int(min(ceiling.params, ceiling.macs, math.prod(shape)) // (shape[1] * size))
        heads = options.get("heads") or most
        return [HeadsSpec(heads, size)] if 1 <= heads <= most else []

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[HeadsSpec]:
        """Return the fewest heads on the greedy path whose error is within the tolerance."""
        found = self.curve(weight, metric, options, math.inf)
        good = [spec for spec, error in found if error <= tolerance]
        size = options.get("size", 1)
        return good[:1] or [HeadsSpec(weight.shape[0] // size, size)]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[HeadsSpec, float]]:
        """Return the error with every number of heads."""
        size, heads = options.get("size", 1), options.get("heads")
        _, left = _order(weight, metric, size, heads)
        total = left[0] or 1.0
        return [
            (HeadsSpec(number, size), max(rest / total, 0.0) ** 0.5)
            for number, rest in enumerate(left)
            if number and heads in (None, number)
        ]

    def reconstruct(self, shape: Shape, spec: HeadsSpec, factors: Factors) -> Tensor:
        """Return the ``(hidden, out)`` matrix: the new rows, and zeros for dropped heads."""
        table = factors["rows"].new_zeros(shape)
        table[_rows(factors["kept"], spec.size)] = factors["rows"]
        return table


def _rows(heads: Tensor, size: int) -> Tensor:
    """Return the rows of some heads."""
    return (heads.unsqueeze(1) * size + torch.arange(size).to(heads)).flatten()


def _order(
    weight: Tensor, metric: Metric, size: int, heads: int | None = None
) -> tuple[Tensor, list[float]]:
    """Order the heads, best first: all, or ``heads`` of them.

    Also return the squared error left with none, one, two and more heads.
    """
    residual, weighed = moment_of(weight, metric).clone(), weighted(weight, metric)
    count = len(residual) // size
    floor = FLOOR * float(residual.diagonal().mean()) or 1.0
    ridge = floor * torch.eye(size, dtype=residual.dtype, device=residual.device)
    effect = residual @ weighed  # (hidden, out): what each row explains, given the heads taken
    left = [float((effect * weighed).sum())]
    free = torch.ones(count, dtype=torch.bool, device=weight.device)
    taken: list[Tensor] = []
    for _ in range(count if heads is None else heads):
        blocks = torch.stack([residual[_of(h, size), _of(h, size)] for h in range(count)])
        effects = effect.unflatten(0, (count, size))
        solved = torch.linalg.solve(blocks + ridge, effects)
        gain = (effects * solved).sum((1, 2)).clamp_min(0.0)
        best = greatest(torch.where(free, gain, -1.0), 1)
        free[best] = False
        taken.append(best)
        rows = _of(int(best), size)
        left.append(max(left[-1] - float(gain[best]), 0.0))
        explained = torch.linalg.solve(residual[rows, rows] + ridge, residual[rows])
        columns = residual[:, rows].clone()
        effect -= columns @ solved[int(best)]
        residual -= columns @ explained
    return torch.cat(taken), left


def _of(head: int, size: int) -> slice:
    return slice(head * size, (head + 1) * size)


FORMAT = Heads()
