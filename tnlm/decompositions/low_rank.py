"""Low rank: W = left @ right, the truncated SVD under a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.accelerated import SWEEPS, accelerated
from tnlm.decompositions.base import FITTING, Ceiling, Format, Shape, matrix_shape
from tnlm.decompositions.whitening import grown
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.linalg import rank_for, tails, truncated_svd
from tnlm.tensors.network import Factors, Gauge, Network
from tnlm.utils.ties import EXACT, least

RANKS = 192
"""Most ranks at which an error curve is sampled."""


@dataclass(frozen=True)
class LowRankSpec:
    """The rank, and whether the bond is gauge-fixed: r(m+n-r) parameters instead of r(m+n).

    The identity is on the shorter side, where a layer has fewer values to reorder.

    Under an elementwise metric, ``sweeps`` limits the passes of the fit, and ``ridge`` shrinks the
    factors, see :func:`tnlm.decompositions.accelerated.accelerated`.
    """

    rank: int
    gauge: bool = True
    ridge: float = field(default=0.0, metadata=FITTING, repr=False)
    sweeps: int = field(default=SWEEPS, metadata=FITTING, repr=False)


class LowRank(Format[LowRankSpec]):
    """Truncated SVD, optimal under every separable metric.

    With C the metric's second moment, ``||(W - W') C^(1/2)||`` is minimal at ``W' = U @ U.T @ W``,
    where U spans the leading left singular vectors of ``W C^(1/2)``. This needs no inverse of C, so
    C may be singular, and full rank is exact. The squared error is the tail of the squared singular
    values (Eckart-Young). A weighting of the outputs adds its own whitening. Elementwise weights
    have no closed form: the fit is accelerated alternating least squares from the best of four
    starts (TFWSVD, Hua et al. 2022, arXiv 2211.09718).

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
    metrics = frozenset({"identity", "input", "separable", "elementwise", "tokens"})
    kinds = frozenset({"linear", "embedding"})
    stacks = True

    def network(self, shape: Shape, spec: LowRankSpec) -> Network:
        """Return ``or,ri->oi``."""
        if spec.rank > min(shape):
            raise RankError(
                f"rank={spec.rank}; a {shape[0]}x{shape[1]} matrix allows 1 to {min(shape)}",
                argument="rank",
            )
        sizes = {"o": shape[0], "r": spec.rank, "i": shape[1]}
        gauge = Gauge("left" if shape[0] < shape[1] else "right", "r") if spec.gauge else None
        return Network({"left": "or", "right": "ri"}, "o", "i", sizes, gauge)

    def fit(self, weight: Tensor, metric: Metric, spec: LowRankSpec) -> Factors:
        """Return the best factors of the rank, in closed form if the metric is separable."""
        start, _ = _closed_form(weight, metric, spec.rank)
        if metric.separable:
            return start
        network = self.network(matrix_shape(weight), spec)
        asked: dict[str, Any] = {"sweeps": spec.sweeps, "ridge": spec.ridge}
        start = _balanced(start) if spec.ridge else start
        return accelerated(network, weight, metric, start, **asked).factors

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[LowRankSpec]:
        """Return the given rank, or the largest within the budget."""
        like = _like(options)
        if options.get("rank") is not None:
            spec = replace(like, rank=options["rank"])
            return [spec] if ceiling.allows(self.network(shape, spec)) else []
        low, high = 0, min(shape)
        while low < high:
            middle = (low + high + 1) // 2
            fits = ceiling.allows(self.network(shape, replace(like, rank=middle)))
            low, high = (middle, high) if fits else (low, middle - 1)
        return [replace(like, rank=low)] if low else []

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[LowRankSpec]:
        """Return the smallest rank whose tail is within the tolerance.

        Under elementwise weights, the tail is that of the nearest separable metric and not a bound,
        so the rank grows until the measured error is within the tolerance.
        """
        energy, like = metric.start().spectrum(weight), _like(options)

        def spec_at(bound: float) -> LowRankSpec:
            return replace(like, rank=rank_for(energy, bound))

        if metric.separable:
            return [spec_at(tolerance)]
        return [grown(spec_at, lambda s: _closed_form(weight, metric, s.rank)[1], tolerance)]

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[LowRankSpec]) -> list[float]:
        """Return the tail of the spectrum at each rank, under the nearest separable metric."""
        tail = tails(metric.start().spectrum(weight))
        total = float(tail[0]) or 1.0
        return [(float(tail[min(spec.rank, len(tail) - 1)]) / total) ** 0.5 for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[LowRankSpec, float]]:
        """Return up to ``RANKS`` evenly spaced ranks, each with the tail of the spectrum."""
        shape, like = matrix_shape(weight), _like(options)
        full = min(shape)
        ranks = sorted({math.ceil(full * k / RANKS) for k in range(1, RANKS + 1)})
        if options.get("rank") is not None:
            ranks = [options["rank"]]
        specs = [replace(like, rank=rank) for rank in ranks]
        allowed = [spec for spec in specs if Ceiling(macs=macs).allows(self.network(shape, spec))]
        return list(zip(allowed, self.errors(weight, metric, allowed), strict=True))


def _like(options: Mapping[str, Any]) -> LowRankSpec:
    """Return a spec of rank 1 with the other options given."""
    names = ("gauge", "ridge", "sweeps")
    return LowRankSpec(1, **{name: options[name] for name in names if name in options})


def _balanced(factors: Factors) -> Factors:
    """Return the same product, with both sides scaled by the root of its singular values."""
    q_left, r_left = torch.linalg.qr(factors["left"])
    q_right, r_right = torch.linalg.qr(factors["right"].T)
    svd = truncated_svd(r_left @ r_right.T, method="exact")
    root = svd.s.sqrt()
    return {"left": q_left @ (svd.u * root), "right": (root[:, None] * svd.vh) @ q_right.T}


def _closed_form(weight: Tensor, metric: Metric, rank: int) -> tuple[Factors, float]:
    """Return the best closed form for a metric and, if it had to be measured, its error."""
    near = metric.start()
    if metric.separable:
        return dict(zip(("left", "right"), metric.low_rank(weight, rank), strict=True)), math.nan
    # Weights of rows and columns, of columns only (FWSVD), of rows only, or none (SVD).
    found = []
    for candidate in (near, Metric(inputs=near.inputs), Metric(near.outputs), Metric()):
        left, right = candidate.low_rank(weight, rank)
        found.append(({"left": left, "right": right}, metric.relative(weight, left @ right)))
    return found[least([error for _, error in found], EXACT)]


FORMAT = LowRank()
