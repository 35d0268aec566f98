"""Stack Tucker: slices of one shape as a third-order tensor, with shared bases and cores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.base import (
    FIXED,
    Ceiling,
    Format,
    Shape,
    as_tensor,
    check_split,
    matrix_shape,
)
from tnlm.decompositions.hooi import Hosvd
from tnlm.decompositions.own_cores import Bases, Slice
from tnlm.decompositions.splits import balanced_split, largest_within, scaled
from tnlm.decompositions.tucker import OPEN, Tucker, TuckerSpec, realisable
from tnlm.decompositions.whitening import whiten
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.metrics.stacked import Stacked
from tnlm.tensors.costs import macs as macs_of
from tnlm.tensors.network import Factors, Gauge, Network

Ranks = tuple[int, ...]
SLICE = OPEN[0]
"""The mode that indexes slices; all matrices of a stack share the factors without it."""
SIZES, GRID, COUNTS = 16, 12, 3
"""Sizes on an error curve; ranks per mode to try for each; numbers of cores among candidates."""
SWEEPS = 8
"""Least-squares sweeps in a fit; predicted errors take one."""


@dataclass(frozen=True)
class StackTuckerSpec:
    """The ranks of slices, rows and columns, and the number of slices.

    A matrix of ``slices`` blocks of rows may share its factors with others; ``stack`` is the total
    number of slices. With ``gauge`` the larger basis is stored without its identity block.
    """

    ranks: tuple[int, ...]
    slices: int = field(metadata=FIXED)
    stack: int = field(metadata=FIXED)
    gauge: bool = True


class StackTucker(Format[StackTuckerSpec]):
    """Tucker of slices ``W_s = U (sum over t of a_st G_t) V.T``, the row blocks of a tall matrix.

    All slices share the bases U and V and the cores G_t. A mode of full rank has no factor: with as
    many cores as slices, each slice has its own. If all slices have the same metric, the error of
    the HOSVD of the whitened tensor (multilinear whitening) is within a factor sqrt(3) of the best.
    If their metrics differ (`tnlm.metrics.stacked`), the HOSVD is whitened by the pooled metric,
    then refined by alternating least squares under the true one, which never increase the error.

    Source: Tucker 1966; De Lathauwer, De Moor and Vandewalle 2000; for stacked experts, TD-MoE.

    Example:
        >>> spec = StackTuckerSpec((2, 3, 4), slices=3, stack=3, gauge=False)
        >>> StackTucker().network((12, 5), spec).equation
        'pqr,ap,bq,cr->abc'
        >>> StackTucker().network((4, 5), replace(spec, slices=1)).params
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
            raise RankError(
                f"slices={spec.slices}; allowed: 1 to stack={spec.stack}", argument="slices"
            )
        whole = _whole(shape, spec)
        rows = spec.stack * whole.out_split[1]
        network = Tucker().network((rows, shape[1]), whole)
        bases = [name for name in ("mode2", "mode1") if name in network.factors]
        gauge = None
        if spec.gauge and bases:
            largest = max(bases, key=lambda name: network.shape_of(name)[1])
            gauge = Gauge(largest, network.factors[largest][1])
        return replace(network, sizes={**network.sizes, SLICE: spec.slices}, gauge=gauge)

    def fit(self, weight: Tensor, metric: Metric, spec: StackTuckerSpec) -> Factors:
        """Start from the HOSVD of the whitened slices; then least squares under the metric.

        With one metric for all it is HOOI, of the whitened tensor where the metric has sides.
        """
        slices = _slices(weight, metric, spec)
        if slices is None:
            return Tucker().fit(weight, metric, _whole(matrix_shape(weight), spec))
        start = _Start.of(weight, metric, _dims(matrix_shape(weight), spec))
        bases, _ = start.bases(spec.ranks).improved(slices, SWEEPS)
        found = {"core": torch.stack(bases.cores(slices)), "mode1": bases.left}
        return {k: v for k, v in (found | {"mode2": bases.right}).items() if v is not None}

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[StackTuckerSpec]:
        """Return the given ranks, or scaled row and column ranks for some numbers of cores."""
        like = _like(shape, options)
        fits = self._limit(shape, like, ceiling)
        if options.get("ranks") is not None:
            return [like] if fits(like.ranks) else []
        found = [largest_within(ranks_at, fits) for ranks_at in _scales(_dims(shape, like))]
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
        """Return each spec's relative error: of the HOSVD, or after one sweep of least squares."""
        if not specs:
            return []
        start = _Start.of(weight, metric, _dims(matrix_shape(weight), specs[0]))
        return [self._error(start, spec) for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[StackTuckerSpec, float]]:
        """Return the best ranks of the whitened HOSVD at increasing sizes, with their errors."""
        shape = matrix_shape(weight)
        like = _like(shape, options)
        if options.get("ranks") is not None:
            return [(like, self.errors(weight, metric, [like])[0])]
        start = _Start.of(weight, metric, _dims(shape, like))
        found = []
        for part in range(1, SIZES + 1):
            ceiling = Ceiling(weight.numel() * part / SIZES, macs)
            found.append(start.best(self._limit(shape, like, ceiling)))
        ranks = [each for each in dict.fromkeys(found) if each is not None]
        specs = [replace(like, ranks=each) for each in ranks]
        return [(spec, self._error(start, spec)) for spec in specs]

    def _error(self, start: _Start, spec: StackTuckerSpec) -> float:
        slices = _slices(start.weight, start.metric, spec)
        if slices is None:
            return start.error(spec.ranks)
        _, history = start.bases(spec.ranks).improved(slices, 1)
        size = start.metric.norm(start.weight) ** 2
        return math.sqrt(max(history[-1], 0.0) / size) if size else 0.0

    def _limit(
        self, shape: Shape, like: StackTuckerSpec, ceiling: Ceiling
    ) -> Callable[[Ranks], bool]:
        """Return whether ranks are within a ceiling, where each slice is a matrix of its own."""
        one = shape[0] // like.slices, shape[1]

        def fits(ranks: Ranks) -> bool:
            spec = replace(like, ranks=ranks)
            if self.network(shape, spec).params > ceiling.params:
                return False
            return like.stack * _work(one, replace(spec, slices=1)) <= ceiling.macs

        return fits


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

    def bases(self, ranks: Ranks) -> Bases:
        """Return the row and column bases at the given ranks."""
        return Bases(self._basis(1, ranks[1]), self._basis(2, ranks[2]))

    def _basis(self, mode: int, rank: int) -> Tensor | None:
        basis, side = self.whole.bases[mode], self.sides[mode]
        if rank == len(basis):
            return None
        kept = basis[:, :rank]
        return kept if side is None else side.unscale(kept.T).T

    def best(self, fits: Callable[[Ranks], bool]) -> Ranks | None:
        """Return the ranks that fit with the least error in the whitened tensor, or None.

        Numbers of cores and row ranks are on a grid; each pair determines the largest column rank.
        """
        dims = tuple(self.whole.core.shape)
        found = [_filled(dims, first, fits) for first in product(_grid(dims[0]), _grid(dims[1]))]
        return min((r for r in found if r is not None), key=self.whole.error, default=None)


def _filled(dims: Ranks, first: Ranks, fits: Callable[[Ranks], bool]) -> Ranks | None:
    """Return two ranks with the largest third one that fits, or None."""
    most = min(math.prod(first), dims[2])
    least = -(-max(first) // min(first))
    if least <= dims[2] == most and fits((*first, dims[2])):
        return (*first, dims[2])
    low, high = least - 1, min(most, dims[2] - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits((*first, middle)) else (low, middle - 1)
    return (*first, low) if low >= least else None


def _slices(weight: Tensor, metric: Metric, spec: StackTuckerSpec) -> list[Slice] | None:
    """Return the slices with their metrics if each has its own metric and core, else None."""
    height = weight.shape[0] // spec.slices
    if not isinstance(metric, Stacked) or set(metric.rows) != {height}:
        return None
    if spec.ranks[0] < spec.stack or metric.is_plain:
        return None
    return [Slice.of(w, m) for w, m in zip(weight.split(height), metric.members, strict=True)]


@lru_cache(maxsize=2**16)
def _work(shape: Shape, spec: StackTuckerSpec) -> int:
    """Return the multiply-adds of one slice; a search asks again for each size and each matrix."""
    return macs_of(FORMAT.network(shape, spec))


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
    ranks = tuple(options.get("ranks") or realisable(full, full))
    return StackTuckerSpec(ranks, slices, stack, options.get("gauge", True))


def _dims(shape: Shape, spec: StackTuckerSpec) -> Ranks:
    return spec.slices, shape[0] // spec.slices, shape[1]


def _whole(shape: Shape, spec: StackTuckerSpec) -> TuckerSpec:
    """Return the Tucker spec of the whole stack as a tall matrix."""
    height = shape[0] // spec.slices
    check_split("slices", (spec.slices, height), shape[0])
    return TuckerSpec((spec.stack, height), (shape[1],), spec.ranks)


FORMAT = StackTucker()
