"""Stack Tucker: slices of one shape as a third-order tensor, with shared bases and cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor

from tnlm.decompositions.base import Ceiling, Format, Shape, as_tensor, check_split, matrix_shape
from tnlm.decompositions.hooi import Hosvd
from tnlm.decompositions.splits import balanced_split, largest_within, scaled
from tnlm.decompositions.tucker import OPEN, Tucker, TuckerSpec, realisable
from tnlm.decompositions.whitening import whiten
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.network import Factors, Network

Ranks = tuple[int, ...]
SLICE = OPEN[0]
"""The mode that indexes slices; all matrices of a stack share the factors without it."""
SIZES, GRID, COUNTS = 16, 24, 3
"""Sizes on an error curve; ranks per mode to try for each; numbers of cores among candidates."""


@dataclass(frozen=True)
class StackTuckerSpec:
    """The ranks of slices, rows and columns, and the number of slices.

    A matrix of ``slices`` blocks of rows may share its factors with others; ``stack`` is the total
    number of slices.
    """

    ranks: tuple[int, ...]
    slices: int
    stack: int


class StackTucker(Format[StackTuckerSpec]):
    """Tucker of slices ``W_s = U (sum over t of a_st G_t) V.T``, the row blocks of a tall matrix.

    All slices share the bases U and V and the cores G_t. A mode of full rank has no factor: with as
    many cores as slices, each slice has its own. If all slices have the same metric, the error of
    the HOSVD of the whitened tensor (multilinear whitening) is within a factor sqrt(3) of the best,
    and HOOI improves it. If their metrics differ (`tnlm.metrics.stacked`), the HOSVD is whitened by
    the pooled metric, then refined by alternating least squares under the true one, which never
    increase the error.

    Source: Tucker 1966; De Lathauwer, De Moor and Vandewalle 2000; for stacked experts, TD-MoE.

    Example:
        >>> StackTucker().network((12, 5), StackTuckerSpec((2, 3, 4), slices=3, stack=3)).equation
        'pqr,ap,bq,cr->abc'
        >>> StackTucker().network((4, 5), StackTuckerSpec((2, 3, 4), slices=1, stack=3)).params
        58
    """

    name = "stack-tucker"
    title = "Tucker of stacked matrices, with shared bases and cores"
    spec = StackTuckerSpec
    metrics = frozenset({"identity", "input", "separable"})
    kinds = frozenset({"stack"})
    made_of = frozenset({"linear"})

    def network(self, shape: Shape, spec: StackTuckerSpec) -> Network:
        """Return a core and a factor for every reduced mode, for the matrix's own slices."""
        if spec.slices > spec.stack:
            raise RankError(f"slices={spec.slices}; allowed: 1 to stack={spec.stack}")
        whole = _whole(shape, spec)
        rows = spec.stack * whole.out_split[1]
        network = Tucker().network((rows, shape[1]), whole)
        return replace(network, sizes={**network.sizes, SLICE: spec.slices})

    def fit(self, weight: Tensor, metric: Metric, spec: StackTuckerSpec) -> Factors:
        """Start from the HOSVD of the whitened slices, then HOOI, then least squares."""
        return Tucker().fit(weight, metric, _whole(matrix_shape(weight), spec))

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[StackTuckerSpec]:
        """Return the given ranks, or scaled row and column ranks for some numbers of cores."""
        like = _like(shape, options)
        dims = _dims(shape, like)

        def fits(ranks: Ranks) -> bool:
            return ceiling.allows(self.network(shape, replace(like, ranks=ranks)))

        if options.get("ranks") is not None:
            return [like] if fits(like.ranks) else []
        found = [largest_within(ranks_at, fits) for ranks_at in _scales(dims)]
        return [replace(like, ranks=ranks) for ranks in dict.fromkeys(found) if ranks is not None]

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[StackTuckerSpec]:
        """Return ranks that allow ``tolerance / sqrt(3)`` per unfolding; see `Tucker`."""
        like = _like(matrix_shape(weight), options)
        if options.get("ranks") is not None:
            return [like] if self.errors(weight, metric, [like])[0] <= tolerance else []
        whole = _whole(matrix_shape(weight), like)
        splits = {"out_split": whole.out_split, "in_split": whole.in_split}
        found = Tucker().within(weight, metric, splits, tolerance)
        return [replace(like, ranks=spec.ranks) for spec in found]

    def errors(
        self, weight: Tensor, metric: Metric, specs: Sequence[StackTuckerSpec]
    ) -> list[float]:
        """Return the relative error of each spec's whitened HOSVD, which the fit can only lower."""
        if not specs:
            return []
        start = _Start.of(weight, metric, _dims(matrix_shape(weight), specs[0]))
        return [start.error(spec.ranks) for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[StackTuckerSpec, float]]:
        """Return the best ranks of the whitened HOSVD at increasing sizes, with their errors."""
        shape = matrix_shape(weight)
        like = _like(shape, options)
        if options.get("ranks") is not None:
            return [(like, self.errors(weight, metric, [like])[0])]
        start = _Start.of(weight, metric, _dims(shape, like))
        sizes = [weight.numel() * k / SIZES for k in range(1, SIZES + 1)]
        found = [start.best(size) for size in sizes]
        ranks = [each for each in dict.fromkeys(found) if each is not None]
        return [(replace(like, ranks=each), start.error(each)) for each in ranks]


@dataclass(frozen=True)
class _Start:
    """The HOSVD of whitened slices, and the errors of its truncations."""

    weight: Tensor
    metric: Metric
    sides: Sequence[Side | None]
    whole: Hosvd

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, dims: Ranks) -> _Start:
        sides = metric.modes(dims[:2], dims[2:])
        tensor = as_tensor(weight, dims)
        return cls(weight, metric, sides, Hosvd.of(whiten(tensor, sides)))

    def error(self, ranks: Ranks) -> float:
        """Return the relative error in the metric at some ranks."""
        found = self.whole.truncated(ranks)
        for mode, side in enumerate(self.sides):
            if side is not None:
                found = side.unscale(found.movedim(mode, -1)).movedim(-1, mode)
        return self.metric.relative(self.weight, found.reshape(self.weight.shape))

    def best(self, size: float) -> Ranks | None:
        """Return the ranks with the least error in the whitened tensor within a size, or None.

        Numbers of cores and row ranks are on a grid; each pair determines the largest column rank.
        """
        dims = tuple(self.whole.core.shape)
        cores, rows = (_grid(dim) for dim in dims[:2])
        fitting = (_filled(dims, (core, row), size) for core in cores for row in rows)
        found = [ranks for ranks in fitting if ranks is not None]
        return min(found, key=self.whole.error, default=None)


def _filled(dims: Ranks, first: Ranks, size: float) -> Ranks | None:
    """Return two ranks with the largest third one that fits in ``size`` parameters."""
    room = size - sum(rank * dim for rank, dim in zip(first, dims, strict=False) if rank < dim)
    each, full = math.prod(first), dims[2]
    last = min(int(room / (each + full)), full - 1, each)
    ranks = (*first, full if full <= each and each * full <= room else last)
    return ranks if last >= 1 and realisable(dims, ranks) == ranks else None


def _grid(dim: int) -> list[int]:
    return sorted({math.ceil(dim * k / GRID) for k in range(1, GRID + 1)})


def _scales(dims: Ranks) -> Iterator[Callable[[float], Ranks]]:
    """Yield functions from a scale to ranks, for some numbers of cores, scaling rows or columns."""
    counts = sorted({math.ceil(dims[0] * k / COUNTS) for k in range(1, COUNTS + 1)}, reverse=True)
    for cores, reduced in product(counts, ((1, 2), (2,), (1,))):

        def ranks_at(scale: float, cores: int = cores, reduced: Ranks = reduced) -> Ranks:
            ranks = [scaled((d,), scale)[0] if k in reduced else d for k, d in enumerate(dims)]
            return realisable(dims, (cores, *ranks[1:]))

        yield ranks_at


def _like(shape: Shape, options: Mapping[str, Any]) -> StackTuckerSpec:
    """Return the spec in the options, with full ranks if none are given."""
    slices = options.get("slices") or balanced_split(shape[0], 2)[0]
    stack = options.get("stack") or slices
    check_split("slices", (slices, shape[0] // slices), shape[0])
    full = (stack, shape[0] // slices, shape[1])
    return StackTuckerSpec(tuple(options.get("ranks") or realisable(full, full)), slices, stack)


def _dims(shape: Shape, spec: StackTuckerSpec) -> Ranks:
    return spec.slices, shape[0] // spec.slices, shape[1]


def _whole(shape: Shape, spec: StackTuckerSpec) -> TuckerSpec:
    """Return the Tucker spec of the whole stack as a tall matrix."""
    height = shape[0] // spec.slices
    check_split("slices", (spec.slices, height), shape[0])
    return TuckerSpec((spec.stack, height), (shape[1],), spec.ranks)
