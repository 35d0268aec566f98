"""Low rank: W = left @ right, the truncated SVD under a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tnlm.calibration.metrics import Metric
from tnlm.decompositions.base import Budget, Format, Shape
from tnlm.decompositions.linalg import rank_for, tails
from tnlm.errors import RankError
from tnlm.network import Factors, Gauge, Network


@dataclass(frozen=True)
class LowRankSpec:
    """The rank, and whether the bond is stored gauge-fixed: r(m+n-r) numbers, not r(m+n)."""

    rank: int
    gauge: bool = True


class LowRank(Format[LowRankSpec]):
    """Truncated SVD, exact under every metric on the inputs.

    With C the metric's second moment, ``||(W - W') C^(1/2)||`` is least at
    ``W' = U @ U.T @ W`` where U spans the leading left singular vectors of ``W C^(1/2)``: no
    inverse of C is needed, so a singular C does no harm, and full rank is exact. Its squared error
    is the tail of the squared singular values (Eckart-Young).

    Example:
        >>> import torch
        >>> weight = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 5.0))
        >>> factors = FORMAT.fit(weight, Metric(), LowRankSpec(rank=1))
        >>> bool(torch.allclose(factors["left"] @ factors["right"], weight.double()))
        True
    """

    name = "low-rank"
    title = "low rank, W = left @ right"
    spec = LowRankSpec
    metrics = frozenset({"identity", "input"})
    kinds = frozenset({"linear", "embedding"})

    def network(self, shape: Shape, spec: LowRankSpec) -> Network:
        """Return ``or,ri->oi``."""
        if spec.rank > min(shape):
            raise RankError(
                f"rank={spec.rank}; a {shape[0]}x{shape[1]} matrix allows 1 to {min(shape)}"
            )
        sizes = {"o": shape[0], "r": spec.rank, "i": shape[1]}
        gauge = Gauge("left", "r") if spec.gauge else None
        return Network({"left": "or", "right": "ri"}, "o", "i", sizes, gauge)

    def fit(self, weight: Tensor, metric: Metric, spec: LowRankSpec) -> Factors:
        """Return the best product of the rank under a separable metric, in closed form."""
        left, right = metric.low_rank(weight, spec.rank)
        return {"left": left, "right": right}

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], budget: Budget
    ) -> Sequence[LowRankSpec]:
        """Return the rank asked for, or the largest within the budget."""
        gauge = options.get("gauge", True)
        if options.get("rank") is not None:
            spec = LowRankSpec(options["rank"], gauge)
            return [spec] if budget.allows(self.network(shape, spec)) else []
        low, high = 0, min(shape)
        while low < high:
            middle = (low + high + 1) // 2
            fits = budget.allows(self.network(shape, LowRankSpec(middle, gauge)))
            low, high = (middle, high) if fits else (low, middle - 1)
        return [LowRankSpec(low, gauge)] if low else []

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[LowRankSpec]:
        """Return the smallest rank whose tail is within the tolerance."""
        rank = rank_for(metric.spectrum(weight), tolerance)
        return [LowRankSpec(rank, options.get("gauge", True))]

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[LowRankSpec]) -> list[float]:
        """Return the tail of the spectrum at each rank (Eckart-Young)."""
        tail = tails(metric.spectrum(weight))
        total = float(tail[0]) or 1.0
        return [(float(tail[min(spec.rank, len(tail) - 1)]) / total) ** 0.5 for spec in specs]


FORMAT = LowRank()
