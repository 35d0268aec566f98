"""Low rank: W = left @ right, the truncated SVD under a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tnlm.calibration.metrics import Metric
from tnlm.decompositions.als import als
from tnlm.decompositions.base import Budget, Format, Shape, matrix_shape
from tnlm.decompositions.linalg import rank_for, tails
from tnlm.decompositions.whitening import grown
from tnlm.errors import RankError
from tnlm.network import Factors, Gauge, Network

RANKS = 192
"""Ranks at which an error curve is sampled, at most."""


@dataclass(frozen=True)
class LowRankSpec:
    """The rank, and whether the bond is stored gauge-fixed: r(m+n-r) numbers, not r(m+n).

    The identity stands on the shorter side, where a layer has fewer numbers to put in order.
    """

    rank: int
    gauge: bool = True


class LowRank(Format[LowRankSpec]):
    """Truncated SVD, exact under every separable metric.

    With C the metric's second moment, ``||(W - W') C^(1/2)||`` is least at
    ``W' = U @ U.T @ W`` where U spans the leading left singular vectors of ``W C^(1/2)``: no
    inverse of C is needed, so a singular C does no harm, and full rank is exact. Its squared error
    is the tail of the squared singular values (Eckart-Young). A form on the outputs adds its own
    whitening. Under element-wise weights there is no closed form: alternating least squares from
    the best of four (TFWSVD, Hua et al. 2022, arXiv 2211.09718).

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
    metrics = frozenset({"identity", "input", "separable", "elementwise"})
    kinds = frozenset({"linear", "embedding"})
    stacks = True

    def network(self, shape: Shape, spec: LowRankSpec) -> Network:
        """Return ``or,ri->oi``."""
        if spec.rank > min(shape):
            raise RankError(
                f"rank={spec.rank}; a {shape[0]}x{shape[1]} matrix allows 1 to {min(shape)}"
            )
        sizes = {"o": shape[0], "r": spec.rank, "i": shape[1]}
        gauge = Gauge("left" if shape[0] < shape[1] else "right", "r") if spec.gauge else None
        return Network({"left": "or", "right": "ri"}, "o", "i", sizes, gauge)

    def fit(self, weight: Tensor, metric: Metric, spec: LowRankSpec) -> Factors:
        """Return the best product of the rank, in closed form if the metric is separable."""
        start, _ = _closed_form(weight, metric, spec.rank)
        if metric.separable:
            return start
        return als(self.network(matrix_shape(weight), spec), weight, metric, start).factors

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
        """Return the smallest rank whose tail is within the tolerance.

        Under element-wise weights the tail is that of the nearest separable metric, and no bound:
        the rank grows until it holds.
        """
        energy, gauge = metric.start().spectrum(weight), options.get("gauge", True)

        def spec_at(bound: float) -> LowRankSpec:
            return LowRankSpec(rank_for(energy, bound), gauge)

        if metric.separable:
            return [spec_at(tolerance)]
        return [grown(spec_at, lambda s: _closed_form(weight, metric, s.rank)[1], tolerance)]

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[LowRankSpec]) -> list[float]:
        """Return the tail of the spectrum at each rank (Eckart-Young), of the nearest metric."""
        tail = tails(metric.start().spectrum(weight))
        total = float(tail[0]) or 1.0
        return [(float(tail[min(spec.rank, len(tail) - 1)]) / total) ** 0.5 for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[LowRankSpec, float]]:
        """Return every rank, or ``RANKS`` of them, evenly spaced, with the tail of the spectrum."""
        shape, gauge = matrix_shape(weight), options.get("gauge", True)
        full = min(shape)
        ranks = sorted({math.ceil(full * k / RANKS) for k in range(1, RANKS + 1)})
        if options.get("rank") is not None:
            ranks = [options["rank"]]
        specs = [LowRankSpec(rank, gauge) for rank in ranks]
        allowed = [spec for spec in specs if Budget(macs=macs).allows(self.network(shape, spec))]
        return list(zip(allowed, self.errors(weight, metric, allowed), strict=True))


def _closed_form(weight: Tensor, metric: Metric, rank: int) -> tuple[Factors, float]:
    """Return the best of the closed forms near to a metric and, if there are many, its error."""
    near = metric.start()
    if metric.separable:
        return dict(zip(("left", "right"), metric.low_rank(weight, rank), strict=True)), math.nan
    # Weights of rows times columns, of columns alone (FWSVD), of rows alone, or none (SVD).
    found = []
    for candidate in (near, Metric(inputs=near.inputs), Metric(near.outputs), Metric()):
        left, right = candidate.low_rank(weight, rank)
        found.append(({"left": left, "right": right}, metric.relative(weight, left @ right)))
    return min(found, key=lambda pair: pair[1])


FORMAT = LowRank()
