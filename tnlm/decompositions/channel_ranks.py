"""Channel ranks: fewer hidden channels in a feed-forward layer, then low rank of what stays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.base import FIXED, Ceiling, Format, Shape, matrix_shape
from tnlm.decompositions.channel_layer import Layer
from tnlm.decompositions.low_rank import FORMAT as LOW_RANK
from tnlm.decompositions.low_rank import LowRankSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.costs import macs
from tnlm.tensors.network import Factors, Network
from tnlm.utils.hull import combinations, lower_hull

SHARES = (0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
"""Fractions of the channels at which the ranks of what stays are sampled."""
RANKS = 48
"""Most ranks of a matrix that are sampled at each of them."""


@dataclass(frozen=True)
class ChannelRanksSpec:
    """The channels to keep, and the rank of every narrowed matrix; one of full rank stays whole.

    The matrix that reads the channels comes first, then those that produce them, with the number of
    their other rows or columns in ``sizes``. With ``gauge`` factors are stored without the identity
    block.
    """

    width: int
    ranks: tuple[int, ...]
    sizes: tuple[int, ...] = field(metadata=FIXED)
    gauge: bool = True


Choice = tuple[int, int, float]
"""Parameters, rank, and squared error."""


class ChannelRanks(Format[ChannelRanksSpec]):
    """Keep the channels that best predict the others, then truncate the matrices around them.

    The tall matrix ``(sizes, hidden)`` has the projection that reads the channels above the
    transposed matrices that produce them; the metric is that of each (`tnlm.metrics.stacked`). With
    K the channels kept, as in ``channels``, the narrowed projection is ``W C[:, K] C[K, K]^-1``,
    and the producers keep their rows K. Each becomes low rank under the metric of what stays. For
    the projection, the squared errors add up exactly, since what channels K cannot predict is
    orthogonal to all that reads only K. Errors in dropped rows of producers do not count.

    Source: the Nyström approximation of MoDeGPT (arXiv 2408.09632); truncation as in SVD-LLM
    (arXiv 2403.07378).

    Example:
        >>> spec = ChannelRanksSpec(width=6, ranks=(2, 5), sizes=(4, 5))
        >>> network = FORMAT.network((9, 8), spec)
        >>> [each.shape for each in network.together]
        [(4, 6), (6, 5)]
        >>> [each.params for each in network.together]
        [16, 30]
    """

    name = "channel-ranks"
    title = "fewer hidden channels in a feed-forward layer, low rank of what stays"
    spec = ChannelRanksSpec
    metrics = frozenset({"separable"})
    kinds = frozenset({"channel-ranks"})
    made_of = frozenset({"linear"})

    def network(self, shape: Shape, spec: ChannelRanksSpec) -> Network:
        """Return the network of the matrix that reads the channels, with the others beside it."""
        if not 1 <= spec.width <= shape[1]:
            raise RankError(
                f"width={spec.width}; {shape[1]} channels allow 1 to {shape[1]}", argument="width"
            )
        if len(spec.ranks) != len(spec.sizes) or sum(spec.sizes) != shape[0]:
            raise RankError(
                f"ranks={spec.ranks}; allowed: {len(spec.sizes)} ranks",
                argument="ranks",
            )
        first, *others = (
            _narrowed(_shape(index, spec.sizes, spec.width), rank, spec.gauge)
            for index, rank in enumerate(spec.ranks)
        )
        return replace(first, beside=tuple(others))

    def fit(self, weight: Tensor, metric: Metric, spec: ChannelRanksSpec) -> Factors:
        """Return ``kept``, and of each matrix ``whole0`` or ``left0`` and ``right0``, in order."""
        layer = Layer.of(weight, metric, spec.sizes)
        kept = layer.kept(spec.width)
        factors: Factors = {"kept": kept}
        for index, (part, measured) in enumerate(layer.narrowed(kept)):
            rank = spec.ranks[index]
            if rank == min(part.shape):
                factors[f"whole{index}"] = part
            else:
                left, right = measured.low_rank(part, rank)
                factors |= {f"left{index}": left, f"right{index}": right}
        return factors

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[ChannelRanksSpec]:
        """Return the given sizes, or for some widths the largest ranks in equal proportion."""
        found = []
        for width in _widths(shape[1], options):
            specs = [_spec(width, ranks, options) for ranks in _even(shape, width, options)]
            fitting = [spec for spec in specs if self.allows(shape, spec, ceiling)]
            found += fitting[-1:]
        return found

    def allows(self, shape: Shape, spec: ChannelRanksSpec, ceiling: Ceiling) -> bool:
        """Return whether all matrices together are within a ceiling."""
        parts = self.network(shape, spec).together
        params, work = sum(each.params for each in parts), sum(macs(each) for each in parts)
        return ceiling.least <= params <= ceiling.params and work <= ceiling.macs

    def _params(self, shape: Shape, spec: ChannelRanksSpec) -> int:
        return sum(each.params for each in self.network(shape, spec).together)

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[ChannelRanksSpec]:
        """Return the smallest sampled sizes whose error is within the tolerance."""
        found = self.curve(weight, metric, options, math.inf)
        good = [spec for spec, error in found if error <= tolerance]
        return [min(good, key=partial(self._params, matrix_shape(weight)))] if good else []

    def errors(
        self, weight: Tensor, metric: Metric, specs: Sequence[ChannelRanksSpec]
    ) -> list[float]:
        """Return the relative error of each spec: what the width leaves, and tails of spectra."""
        found: dict[ChannelRanksSpec, float] = {}
        for width in {spec.width for spec in specs}:
            alike = [spec for spec in specs if spec.width == width]
            layer = Layer.of(weight, metric, alike[0].sizes)
            left, parts = layer.left(width), layer.tails(width)
            for spec in alike:
                lost = left + sum(float(t[r]) for t, r in zip(parts, spec.ranks, strict=True))
                found[spec] = layer.relative(lost)
        return [found[spec] for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[ChannelRanksSpec, float]]:
        """Return the best ranks at some widths, then whole matrices at every width of the order."""
        if options.get("ranks") is not None:
            specs = self.candidates((len(weight), weight.shape[1]), options, Ceiling(macs=macs))
            return list(zip(specs, self.errors(weight, metric, specs), strict=True))
        layer = Layer.of(weight, metric, options["sizes"])
        found: list[tuple[int, ChannelRanksSpec, float]] = []
        for width in _on_path(_widths(weight.shape[1], options), layer, options):
            left, parts = layer.left(width), layer.tails(width)
            sampled = list(_sampled(width, layer.sizes, parts, options))
            for chosen in combinations(sampled, _point):
                spec = _spec(width, tuple(rank for _, rank, _ in chosen), options)
                lost = left + sum(error for _, _, error in chosen)
                found.append((sum(params for params, _, _ in chosen), spec, lost))
        found.sort(key=lambda each: (each[0], each[2]))
        best = lower_hull(_falling(found), lambda each: (each[0], each[2]))
        return [(spec, layer.relative(lost)) for _, spec, lost in best] + _plain(layer, options)

    def reconstruct(self, shape: Shape, spec: ChannelRanksSpec, factors: Factors) -> Tensor:
        """Return the ``(sizes, hidden)`` matrix, with zeros for the dropped channels."""
        table = factors["kept"].new_zeros(shape, dtype=torch.float64)
        rows = table.split(list(spec.sizes))
        for index, block in enumerate(rows):
            part = matrix_of(factors, index)
            block[:, factors["kept"]] = part if index == 0 else part.T
        return table


def matrix_of(factors: Factors, index: int) -> Tensor:
    """Return the narrowed matrix of an index, ``(out, in)``."""
    whole = factors.get(f"whole{index}")
    return factors[f"left{index}"] @ factors[f"right{index}"] if whole is None else whole


def _shape(index: int, sizes: Sequence[int], width: int) -> Shape:
    return (sizes[index], width) if index == 0 else (width, sizes[index])


def _narrowed(shape: Shape, rank: int, gauge: bool) -> Network:
    if rank != min(shape):
        return LOW_RANK.network(shape, LowRankSpec(rank, gauge))
    return Network({"whole": "oi"}, "o", "i", {"o": shape[0], "i": shape[1]})


def _spec(width: int, ranks: tuple[int, ...], options: Mapping[str, Any]) -> ChannelRanksSpec:
    return ChannelRanksSpec(width, ranks, tuple(options["sizes"]), options.get("gauge", True))


def _widths(hidden: int, options: Mapping[str, Any]) -> list[int]:
    if options.get("width") is not None:
        return [options["width"]]
    return sorted({max(1, round(share * hidden)) for share in SHARES})


def _on_path(widths: Sequence[int], layer: Layer, options: Mapping[str, Any]) -> list[int]:
    """Return the nearest widths whose error is known from the order, unless one is given."""
    if options.get("width") is not None:
        return list(widths)
    path = [width for width in layer.order[1] if width]
    return sorted({min(path, key=lambda known: abs(known - width)) for width in widths})


def _ranks(shape: Shape, gauge: bool) -> list[int]:
    """Return up to ``RANKS`` evenly spaced ranks that take fewer parameters than the matrix."""
    full, most = min(shape), math.prod(shape)
    ranks = sorted({math.ceil(full * k / RANKS) for k in range(1, RANKS + 1)})
    return [rank for rank in ranks if _narrowed(shape, rank, gauge).params < most]


def _even(shape: Shape, width: int, options: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Yield growing ranks in equal proportion, or the given ones alone."""
    if options.get("ranks") is not None:
        yield tuple(options["ranks"])
        return
    sizes, gauge = tuple(options["sizes"]), options.get("gauge", True)
    shapes = [_shape(index, sizes, width) for index in range(len(sizes))]
    each = [[*_ranks(shape, gauge), min(shape)] for shape in shapes]
    for step in range(max(map(len, each))):
        yield tuple(r[min(step, len(r) - 1)] for r in each)


def _sampled(
    width: int, sizes: Sequence[int], parts: Sequence[Tensor], options: Mapping[str, Any]
) -> Iterator[list[Choice]]:
    """Yield the sampled ranks of each matrix, the smallest first; the last is the whole matrix."""
    gauge = options.get("gauge", True)
    for index, tail in enumerate(parts):
        shape = _shape(index, sizes, width)
        ranks = [
            (_narrowed(shape, r, gauge).params, r, float(tail[r])) for r in _ranks(shape, gauge)
        ]
        yield [*ranks, (math.prod(shape), min(shape), 0.0)]


def _falling(
    found: Sequence[tuple[int, ChannelRanksSpec, float]],
) -> list[tuple[int, ChannelRanksSpec, float]]:
    """Keep what loses less than everything that is smaller."""
    kept: list[tuple[int, ChannelRanksSpec, float]] = []
    for each in found:
        if not kept or each[2] < kept[-1][2]:
            kept.append(each)
    return kept


def _plain(layer: Layer, options: Mapping[str, Any]) -> list[tuple[ChannelRanksSpec, float]]:
    """Return every width of the order with whole matrices, which need no spectra."""
    if options.get("width") is not None:
        return []
    specs = [
        (_spec(width, tuple(min(size, width) for size in layer.sizes), options), left)
        for width, left in layer.order[1].items()
        if width
    ]
    return [(spec, layer.relative(left)) for spec, left in specs]


def _point(choice: Choice) -> tuple[float, float]:
    return choice[0], choice[2]


FORMAT = ChannelRanks()
