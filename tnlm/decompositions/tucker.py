"""Tucker: a small core, with one factor for every mode of reduced rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from torch import Tensor

from tnlm.decompositions.als import fit_network
from tnlm.decompositions.base import (
    Ceiling,
    Format,
    Shape,
    as_tensor,
    check_split,
    given_split,
    matrix_shape,
)
from tnlm.decompositions.hooi import unfold
from tnlm.decompositions.screening import screened
from tnlm.decompositions.splits import balanced_split, largest_within, scaled
from tnlm.decompositions.tucker_fit import (
    hosvd_error,
    is_low_rank,
    low_rank_factors,
    nearest,
    orthogonal,
    reduced_modes,
)
from tnlm.decompositions.whitening import closed_form, grown, is_plain, rebuild, whiten
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.linalg import rank_for, spectrum, tails
from tnlm.tensors.network import Factors, Gauge, Network

Split = tuple[int, ...]
OPEN, BOND = "abcdefgh", "pqrstuvw"


@dataclass(frozen=True)
class TuckerSpec:
    """The modes of outputs and of inputs, and one rank per mode, outputs first.

    With ``gauge``, the bond of the largest rank is stored with an identity block, as by default.
    """

    out_split: tuple[int, ...]
    in_split: tuple[int, ...]
    ranks: tuple[int, ...]
    gauge: bool = False


class Tucker(Format[TuckerSpec]):
    """HOSVD, then HOOI sweeps, of the matrix reshaped to its modes.

    A mode of full rank has no factor, since the core absorbs an orthogonal square matrix. A plain
    matrix, with one out mode and one in mode, has no core: its Tucker form is the truncated SVD.
    Source: Tucker 1966; De Lathauwer, De Moor and Vandewalle 2000.

    Example:
        >>> import torch
        >>> spec = TuckerSpec(out_split=(2, 3), in_split=(5,), ranks=(2, 2, 4))
        >>> FORMAT.network((6, 5), spec).equation
        'aqr,bq,cr->abc'
    """

    name = "tucker"
    title = "Tucker of the reshaped matrix"
    spec = TuckerSpec
    metrics = frozenset({"identity", "input", "separable", "elementwise"})

    def network(self, shape: Shape, spec: TuckerSpec) -> Network:
        """Return the core (unless there are only two modes) and a factor for every reduced mode."""
        check_split("out_split", spec.out_split, shape[0])
        check_split("in_split", spec.in_split, shape[1])
        dims = spec.out_split + spec.in_split
        if len(spec.ranks) != len(dims) or len(dims) > len(OPEN):
            raise RankError(
                f"ranks={spec.ranks} for modes {dims}; "
                f"allowed: one rank per mode, at most {len(OPEN)} modes",
                argument="ranks",
            )
        limits = _limits(dims, spec.ranks)
        if any(rank > limit for rank, limit in zip(spec.ranks, limits, strict=True)):
            raise RankError(
                f"ranks={spec.ranks}; modes {dims} allow at most {limits}", argument="ranks"
            )
        sizes = dict(zip(OPEN, dims, strict=False))
        out, inp = OPEN[: len(spec.out_split)], OPEN[len(spec.out_split) : len(dims)]
        if len(dims) == 2:
            sizes["p"] = spec.ranks[0]
            short = Gauge("left" if dims[0] < dims[1] else "right", "p") if spec.gauge else None
            return Network({"left": "ap", "right": "pb"}, out, inp, sizes, short)
        reduced = reduced_modes(dims, spec.ranks)
        sizes |= {BOND[k]: spec.ranks[k] for k in reduced}
        core = "".join(BOND[k] if k in reduced else OPEN[k] for k in range(len(dims)))
        factors = {"core": core} | {f"mode{k}": OPEN[k] + BOND[k] for k in reduced}
        network = Network(factors, out, inp, sizes)
        if not (spec.gauge and reduced):
            return network
        return replace(network, gauge=_gauge(network, max(reduced, key=spec.ranks.__getitem__)))

    def fit(self, weight: Tensor, metric: Metric, spec: TuckerSpec) -> Factors:
        """Start from the HOSVD, then improve one factor at a time (HOOI).

        With data, both are of the whitened matrix, then refined by alternating least squares. If
        only a mode that is all of the outputs or inputs is reduced, the best fit is low rank.
        """
        network = self.network(matrix_shape(weight), spec)
        if is_low_rank(network) and metric.separable:
            return orthogonal(low_rank_factors(network, weight, metric))
        factors = fit_network(network, weight, metric, partial(nearest, ranks=spec.ranks))
        return factors if is_plain(metric) else orthogonal(factors)

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[TuckerSpec]:
        """Return, for each split, the given ranks, or ranks scaled on all modes or the longest."""
        found, gauge = [], options.get("gauge", True)
        for out, inp in _splits(shape, options):

            def fits(ranks: tuple[int, ...], out: Split = out, inp: Split = inp) -> bool:
                return ceiling.allows(self.network(shape, TuckerSpec(out, inp, ranks, gauge)))

            for ranks_at in _scales(out + inp, options):
                ranks = largest_within(ranks_at, fits)
                if ranks is not None:
                    found.append(TuckerSpec(out, inp, ranks, gauge))
        return list(dict.fromkeys(found))

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[TuckerSpec]:
        """Return ranks that allow ``tolerance / sqrt(modes)`` per unfolding (HOSVD bound).

        With data, the unfoldings are of the whitened matrix and give no bound, so the ranks grow
        until the measured error is within the tolerance.
        """
        found, gauge = [], options.get("gauge", True)
        for out, inp in _splits(matrix_shape(weight), options):
            tensor = whiten(as_tensor(weight, out, inp), metric.modes(out, inp))
            spectra = [spectrum(unfold(tensor, mode)) for mode in range(tensor.dim())]

            def spec_at(
                bound: float,
                out: Split = out,
                inp: Split = inp,
                spectra: Sequence[Tensor] = spectra,
            ) -> TuckerSpec:
                share = bound / math.sqrt(len(spectra))
                ranks = tuple(rank_for(energy, share) for energy in spectra)
                return TuckerSpec(out, inp, _supported(out + inp, ranks), gauge)

            if is_plain(metric):
                found.append(spec_at(tolerance))
            else:
                error_of = partial(self._closed_form_error, weight, metric)
                found.append(grown(spec_at, error_of, tolerance))
        return found

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[TuckerSpec]) -> list[float]:
        """Return the relative error of each spec's HOSVD, which HOOI can only lower.

        With data, it is the error of the HOOI, which least squares can only lower.
        """
        if is_plain(metric):
            return [
                hosvd_error(weight, spec.out_split, spec.in_split, spec.ranks) for spec in specs
            ]
        return [self._closed_form_error(weight, metric, spec) for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[TuckerSpec, float]]:
        """Return the best ranks at each of many sizes, predicted from the unfoldings' tails."""
        return screened(self, weight, metric, options, macs, _bounds)

    def _closed_form_error(self, weight: Tensor, metric: Metric, spec: TuckerSpec) -> float:
        network = self.network(matrix_shape(weight), spec)
        if is_low_rank(network) and metric.separable:
            return metric.relative(weight, rebuild(network, self.fit(weight, metric, spec)))
        return closed_form(network, weight, metric, partial(nearest, ranks=spec.ranks))[1]


def _bounds(weight: Tensor, specs: Sequence[TuckerSpec]) -> list[float]:
    """Return the HOSVD bound of each spec: the tails of all unfoldings, each computed once."""

    @cache
    def tail(out: Split, inp: Split, mode: int) -> Tensor:
        found = tails(spectrum(unfold(as_tensor(weight, out, inp), mode)))
        return found / (float(found[0]) or 1.0)

    found = []
    for spec in specs:
        dims = spec.out_split + spec.in_split
        modes = reduced_modes(dims, spec.ranks)[: None if len(dims) > 2 else 1]
        lost = sum(
            float(tail(spec.out_split, spec.in_split, mode)[spec.ranks[mode]]) for mode in modes
        )
        found.append(min(lost, 1.0) ** 0.5)
    return found


def _gauge(network: Network, mode: int) -> Gauge:
    """Return where the bond of a mode has its identity block.

    It is in the mode's factor, or in the core if that factor holds the rows of the matrix, so that
    rows of a head can be added and taken away; but never is it all of the core.
    """
    bond = BOND[mode]
    rest = math.prod(network.shape_of("core")) // network.sizes[bond]
    in_core = OPEN[mode] == network.out and rest > network.sizes[bond]
    return Gauge("core" if in_core else f"mode{mode}", bond)


def _limits(dims: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return every mode's largest useful rank: at most its size and the product of the others."""
    total = math.prod(ranks)
    return tuple(min(size, total // rank) for size, rank in zip(dims, ranks, strict=True))


def _scales(
    dims: Split, options: Mapping[str, Any]
) -> Iterator[Callable[[float], tuple[int, ...]]]:
    """Yield functions from a scale to ranks: fixed if given, else scaled on all or the longest."""
    if options.get("ranks"):
        yield lambda _: _given(options["ranks"], dims)
    else:
        yield lambda scale: realisable(dims, scaled(dims, scale))
        yield lambda scale: realisable(dims, _longest(dims, scale))


def realisable(dims: Split, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Lower ranks to what the ranks of the other modes support."""
    while (lower := _lowered(dims, ranks)) != ranks:
        ranks = lower
    return ranks


def _lowered(dims: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(rank, limit) for rank, limit in zip(ranks, _limits(dims, ranks), strict=True))


def _longest(dims: tuple[int, ...], scale: float) -> tuple[int, ...]:
    longest = dims.index(max(dims))
    return tuple(scaled((d,), scale)[0] if k == longest else d for k, d in enumerate(dims))


def _supported(dims: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Raise the smallest ranks until every rank is supported by the others."""
    while any(r > limit for r, limit in zip(ranks, _limits(dims, ranks), strict=True)):
        growing = [k for k, (size, rank) in enumerate(zip(dims, ranks, strict=True)) if rank < size]
        smallest = min(growing, key=ranks.__getitem__)
        ranks = tuple(rank + (k == smallest) for k, rank in enumerate(ranks))
    return ranks


def _given(ranks: Sequence[int], dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return given ranks for every mode; a single one caps all modes."""
    return tuple(min(ranks[0], d) for d in dims) if len(ranks) == 1 else tuple(ranks)


def _splits(
    shape: Shape, options: Mapping[str, Any]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the splits to try: as many modes as ranks; by default, three or four."""
    out = given_split("out_split", options, shape[0], range(1, len(OPEN)))
    inp = given_split("in_split", options, shape[1], range(1, len(OPEN)))
    outs = [out] if out else [balanced_split(shape[0], parts) for parts in (1, 2)]
    inps = [inp] if inp else [balanced_split(shape[1], parts) for parts in (1, 2)]
    ranks = tuple(options.get("ranks") or ())
    allowed: Sequence[int] = (len(ranks),) if len(ranks) > 1 else range(2, 2 * len(OPEN))
    found = [(o, i) for o in outs for i in inps if len(o + i) in allowed]
    if not found:
        raise RankError(
            f"ranks={ranks}; allowed: one for all modes, or one for each size of out_split and of "
            f"in_split; without splits, 2 to 4 ranks",
            argument="ranks",
        )
    for pair in found:
        # A plain matrix gives low rank, which has its own format, so only on request.
        if out or inp or len(ranks) > 1 or len(pair[0] + pair[1]) > 2:
            yield pair


FORMAT = Tucker()
