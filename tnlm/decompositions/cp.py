"""Canonical polyadic decomposition (CP): a sum of rank-one terms of the reshaped matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tnlm.decompositions.als import als
from tnlm.decompositions.base import (
    Ceiling,
    Format,
    Shape,
    as_tensor,
    check_split,
    given_split,
    matrix_shape,
)
from tnlm.decompositions.cp_fit import largest_terms, normalised, term_energies
from tnlm.decompositions.screening import screened
from tnlm.decompositions.splits import balanced_split
from tnlm.decompositions.whitening import closed_form, grown, rebuild, whiten
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.costs import macs
from tnlm.tensors.linalg import rank_for, tails
from tnlm.tensors.network import Factors, Network
from tnlm.utils.ties import EXACT, least

Split = tuple[int, ...]
OPEN, BOND = "abcdefgh", "r"
SWEEPS, STALL = 12, 1e-2
"""Most sweeps of least squares, and the relative gain below which a sweep is the last."""
TRIAL = 2
"""Sweeps of the trial fit that scales a curve."""


@dataclass(frozen=True)
class CPSpec:
    """The number of terms, and the modes of outputs and of inputs."""

    rank: int
    out_split: tuple[int, ...]
    in_split: tuple[int, ...]


class CP(Format[CPSpec]):
    """The largest orthogonal rank-one terms of the matrix, then alternating least squares.

    The least squares never increase the error; they end at a local minimum, which may not be the
    best. All columns have unit norm, except those of the last mode, which carry the weights. No
    bond is gauge-fixed, since one bond joins all factors and only its columns can be rescaled.

    Source: Hitchcock 1927; Carroll and Chang 1970; Harshman 1970.

    Example:
        >>> import torch
        >>> a, b, c = torch.randn(3, 1), torch.randn(2, 1), torch.randn(4, 1)
        >>> weight = torch.einsum("ar,br,cr->abc", a, b, c).reshape(6, 4)
        >>> spec = CPSpec(rank=1, out_split=(3, 2), in_split=(4,))
        >>> factors = FORMAT.fit(weight, Metric(), spec)
        >>> bool(torch.allclose(FORMAT.reconstruct((6, 4), spec, factors), weight.double()))
        True
    """

    name = "cp"
    title = "sum of rank-one terms (CP) of the reshaped matrix"
    spec = CPSpec
    metrics = frozenset({"identity", "input", "separable", "elementwise"})
    copies = 20.0

    def network(self, shape: Shape, spec: CPSpec) -> Network:
        """Return one factor per mode, all on the same bond."""
        check_split("out_split", spec.out_split, shape[0])
        check_split("in_split", spec.in_split, shape[1])
        dims = spec.out_split + spec.in_split
        if len(dims) > len(OPEN):
            raise RankError(
                f"out_split={spec.out_split}, in_split={spec.in_split}; "
                f"allowed: at most {len(OPEN)} sizes in both",
                argument=("out_split", "in_split"),
            )
        if spec.rank > _limit(dims):
            raise RankError(
                f"rank={spec.rank}; modes {dims} need at most {_limit(dims)} terms", argument="rank"
            )
        sizes = dict(zip(OPEN, dims, strict=False)) | {BOND: spec.rank}
        factors = {f"mode{k}": OPEN[k] + BOND for k in range(len(dims))}
        out, inp = OPEN[: len(spec.out_split)], OPEN[len(spec.out_split) : len(dims)]
        return Network(factors, out, inp, sizes)

    def fit(self, weight: Tensor, metric: Metric, spec: CPSpec) -> Factors:
        """Start from the largest orthogonal terms (with data, also of the whitened matrix)."""
        network = self.network(matrix_shape(weight), spec)
        return normalised(_fitted(network, weight, metric, SWEEPS))

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[CPSpec]:
        """Return, for every split, the given rank or the largest that the budget allows."""
        found, largest = [], 0
        for out, inp in _splits(shape, options):
            one = self.network(shape, CPSpec(1, out, inp))
            limit = _limit(out + inp)
            largest = max(largest, limit)
            most = int(min(limit, ceiling.params // one.params, ceiling.macs // macs(one)))
            rank = options.get("rank") or most
            if 1 <= rank <= most:
                found.append(CPSpec(rank, out, inp))
        if (options.get("rank") or 0) > largest:
            raise RankError(
                f"rank={options['rank']}; a {shape[0]}x{shape[1]} matrix needs at most {largest} "
                "terms for any allowed split",
                argument="rank",
            )
        return found

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[CPSpec]:
        """Return, for every split, the fewest orthogonal terms whose tail is within the tolerance.

        With data, the terms are of the whitened matrix and give no bound, so their number grows
        until the measured error is within the tolerance.
        """
        found, shape = [], matrix_shape(weight)
        for out, inp in _splits(shape, options):
            tensor = whiten(as_tensor(weight, out, inp), metric.modes(out, inp))
            energies = term_energies(tensor)

            def spec_at(
                bound: float, out: Split = out, inp: Split = inp, energies: Tensor = energies
            ) -> CPSpec:
                return CPSpec(rank_for(energies, bound), out, inp)

            def error_of(spec: CPSpec) -> float:
                return _start(self.network(shape, spec), weight, metric)[1]

            found.append(grown(spec_at, error_of, tolerance))
        return found

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[CPSpec]) -> list[float]:
        """Return the relative error of each spec; of several, only the most promising is fitted.

        The others get infinity. Most promising are the specs whose orthogonal terms, of the
        whitened matrix, leave least.
        """
        if len(specs) <= 1:
            return super().errors(weight, metric, specs)
        best = least(_tails(metric.start().whiten(weight), specs), EXACT)
        [error] = super().errors(weight, metric, [specs[best]])
        return [error if index == best else math.inf for index in range(len(specs))]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[CPSpec, float]]:
        """Return the best split at each of many sizes, predicted from the orthogonal terms."""

        def measure(spec: CPSpec) -> float:
            network = self.network(matrix_shape(weight), spec)
            factors = _fitted(network, weight, metric, TRIAL)
            return metric.relative(weight, rebuild(network, factors))

        return screened(self, weight, metric, options, macs, _tails, measure)


def _start(network: Network, weight: Tensor, metric: Metric) -> tuple[Factors, float]:
    """Return orthogonal terms, with their relative error."""
    return closed_form(network, weight, metric, partial(largest_terms, rank=network.sizes[BOND]))


def _fitted(network: Network, weight: Tensor, metric: Metric, sweeps: int) -> Factors:
    start, _ = _start(network, weight, metric)
    return als(network, weight, metric, start, sweeps=sweeps, stall=STALL).factors


def _tails(weight: Tensor, specs: Sequence[CPSpec]) -> list[float]:
    """Return the relative error of each spec's orthogonal terms, each split computed once."""
    found, left = [], dict[tuple[Split, Split], Tensor]()
    for spec in specs:
        key = spec.out_split, spec.in_split
        if key not in left:
            left[key] = tails(term_energies(as_tensor(weight, *key)))
        tail = left[key]
        lost = float(tail[min(spec.rank, len(tail) - 1)])
        found.append((lost / (float(tail[0]) or 1.0)) ** 0.5)
    return found


def _limit(dims: Sequence[int]) -> int:
    """Return a number of terms that suffices for any tensor: one per fibre of the longest mode."""
    return math.prod(dims) // max(dims)


def _splits(shape: Shape, options: Mapping[str, Any]) -> Iterator[tuple[Split, Split]]:
    """Yield the splits to try: by default, each side whole or in two parts, three or four modes."""
    out = given_split("out_split", options, shape[0], range(1, len(OPEN)))
    inp = given_split("in_split", options, shape[1], range(1, len(OPEN)))
    for rows in [out] if out else [balanced_split(shape[0], parts) for parts in (1, 2)]:
        for columns in [inp] if inp else [balanced_split(shape[1], parts) for parts in (1, 2)]:
            # A plain matrix gives low rank, which has its own format, so only on request.
            if out or inp or len(rows + columns) > 2:
                yield rows, columns


FORMAT = CP()
