"""Sum of Kronecker products: W = sum over t of kron(left[t], right[t])."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tnlm.decompositions.als import fit_network
from tnlm.decompositions.base import (
    Ceiling,
    Format,
    Shape,
    as_tensor,
    check_pairs,
    given_split,
    matrix_shape,
)
from tnlm.decompositions.kronecker_fit import balanced, low_rank_factors, nearest
from tnlm.decompositions.kronecker_screen import Spectra, is_low_rank, is_thin
from tnlm.decompositions.screening import KEEPS
from tnlm.decompositions.whitening import (
    closed_form,
    grown,
    is_plain,
    whiten,
)
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.costs import macs
from tnlm.tensors.linalg import rank_for, spectrum
from tnlm.tensors.network import Factors, Gauge, Network
from tnlm.tensors.rearrange import Split, divisor_pairs, rearrange
from tnlm.utils.ties import EXACT, least

FINALISTS = 12
"""Number of splits scored exactly, after all are screened on a sample."""

SCREENED, FEW = (0.5, 0.8), 4
"""Sizes at which a curve's splits are chosen, and the number chosen at each."""
NEAR = 0.9
"""Splits that cannot use this fraction of a size are not screened for it: others are better."""
SCREEN_ROUNDING = 1e-6
"""Difference up to which estimates of squared relative errors in float32 count as equal."""


@dataclass(frozen=True)
class KroneckerSpec:
    """The number of products, and the splits of outputs and inputs into (outer, inner)."""

    terms: int
    out_split: tuple[int, ...]
    in_split: tuple[int, ...]
    gauge: bool = True


class Kronecker(Format[KroneckerSpec]):
    """The nearest sum of Kronecker products: a truncated SVD of the rearranged matrix.

    With splits (out, 1) x (1, in) it is ordinary low rank; two-core tensor trains are the same
    family. Source: Van Loan and Pitsianis, 1993; used by KnGPT2, Shapeshifter and Krony-PT.

    Example:
        >>> import torch
        >>> weight = torch.kron(torch.randn(2, 3), torch.randn(3, 2))
        >>> spec = KroneckerSpec(terms=1, out_split=(2, 3), in_split=(3, 2))
        >>> factors = FORMAT.fit(weight, Metric(), spec)
        >>> bool(torch.allclose(FORMAT.reconstruct((6, 6), spec, factors), weight.double()))
        True
    """

    name = "kronecker"
    title = "sum of Kronecker products"
    spec = KroneckerSpec
    metrics = frozenset({"identity", "input", "separable", "elementwise"})

    def network(self, shape: Shape, spec: KroneckerSpec) -> Network:
        """Return ``tac,tbd->abcd``, gauge-fixed on the smaller factor."""
        check_pairs(shape, spec.out_split, spec.in_split)
        (a, b), (c, d) = spec.out_split, spec.in_split
        if spec.terms > min(a * c, b * d):
            raise RankError(
                f"terms={spec.terms}, but a {shape[0]}x{shape[1]} matrix with out_split={(a, b)}, "
                f"in_split={(c, d)} has at most {min(a * c, b * d)}; "
                "use fewer terms or other splits",
                argument=("terms", "out_split", "in_split"),
            )
        sizes = {"t": spec.terms, "a": a, "b": b, "c": c, "d": d}
        gauge = Gauge("right" if b * d <= a * c else "left", "t") if spec.gauge else None
        return Network({"left": "tac", "right": "tbd"}, "ab", "cd", sizes, gauge)

    def fit(self, weight: Tensor, metric: Metric, spec: KroneckerSpec) -> Factors:
        """Keep the leading singular triplets of R(W), each side scaled by the root of sigma.

        With data, they are those of the whitened matrix, refined by alternating least squares.
        """
        network = self.network(matrix_shape(weight), spec)
        if metric.separable and is_low_rank(*_pairs(spec)) and not is_plain(metric):
            return balanced(low_rank_factors(network, *metric.low_rank(weight, spec.terms)))
        factors = fit_network(network, weight, metric, nearest(spec.terms, *_pairs(spec)))
        return factors if is_plain(metric) else balanced(factors)

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[KroneckerSpec]:
        """Return, for every split, the given terms or the most that the budget allows."""
        found = [
            spec
            for splits in _splits(shape, options)
            if (spec := self._largest(shape, splits, options, ceiling)) is not None
        ]
        if not found and options.get("terms") is not None:
            self._check_terms(shape, options)
        return found

    def _largest(
        self,
        shape: Shape,
        splits: tuple[Split, Split],
        options: Mapping[str, Any],
        ceiling: Ceiling,
    ) -> KroneckerSpec | None:
        (a, b), (c, d) = splits
        most = min(a * c, b * d)
        gauge = options.get("gauge", True)
        one = self.network(shape, KroneckerSpec(1, *splits, gauge=gauge))
        most = int(
            min(most, _most_terms(a * c + b * d, ceiling.params, gauge), ceiling.macs // macs(one))
        )
        terms = options.get("terms") or most
        return KroneckerSpec(terms, *splits, gauge=gauge) if 1 <= terms <= most else None

    def _check_terms(self, shape: Shape, options: Mapping[str, Any]) -> None:
        most = max(min(a * c, b * d) for (a, b), (c, d) in _splits(shape, options))
        if options["terms"] > most:
            raise RankError(
                f"terms={options['terms']}; a {shape[0]}x{shape[1]} matrix has at most {most} "
                "for any allowed split",
                argument="terms",
            )

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[KroneckerSpec]:
        """Return, for every split, the fewest terms whose tail is within the tolerance.

        With data, the tails are those of the whitened matrix and not a bound. The ``FINALISTS``
        smallest specs, and as many no slower than dense, then get terms until the measured error is
        within the tolerance.
        """
        gauge, shape = options.get("gauge", True), matrix_shape(weight)
        spectra = {
            splits: spectrum(rearrange(_whitened(weight, metric, *splits), *splits))
            for splits in _splits(shape, options)
        }

        def spec_at(splits: tuple[Split, Split], bound: float) -> KroneckerSpec:
            return KroneckerSpec(rank_for(spectra[splits], bound), *splits, gauge=gauge)

        found = {splits: spec_at(splits, tolerance) for splits in spectra}
        if is_plain(metric):
            return list(found.values())
        networks = {splits: self.network(shape, spec) for splits, spec in found.items()}
        smallest = sorted(found, key=lambda splits: networks[splits].params)
        fast = [splits for splits in smallest if macs(networks[splits]) <= weight.numel()]
        return [
            grown(
                partial(spec_at, splits),
                lambda spec: self._closed_form_error(weight, metric, spec),
                tolerance,
            )
            for splits in dict.fromkeys(smallest[:FINALISTS] + fast[:FINALISTS])
        ]

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[KroneckerSpec]) -> list[float]:
        """Return the tail of R(W)'s spectrum for each spec; with data, of the whitened W.

        If there are many specs, all are first screened on a sample of the matrix; those not among
        the best ``FINALISTS`` get infinity.
        """
        spectra = Spectra(metric.start().whiten(weight))
        chosen = set(_best(spectra, specs, FINALISTS))
        return [_tail(spectra, spec) if spec in chosen else math.inf for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[KroneckerSpec, float]]:
        """Return the best split at each of many sizes, predicted from the whitened matrix.

        Least squares may leave less, except of low rank, of which the prediction is exact.
        """
        shape, spectra = matrix_shape(weight), Spectra(metric.start().whiten(weight))
        splits = self._promising(spectra, shape, options, macs)
        found = {}
        for keep in KEEPS:
            ceiling = Ceiling(keep * weight.numel(), macs)
            specs = [self._largest(shape, pair, options, ceiling) for pair in splits]
            errors = {spec: _tail(spectra, spec) for spec in specs if spec is not None}
            if errors:
                best = list(errors)[least(list(errors.values()), EXACT)]
                found[best] = errors[best]
        return list(found.items())

    def _promising(
        self, spectra: Spectra, shape: Shape, options: Mapping[str, Any], macs: float
    ) -> list[tuple[Split, Split]]:
        """Return the few splits that are best at a medium and at a large size."""
        size = math.prod(shape)
        found: dict[tuple[Split, Split], None] = {}
        for keep in SCREENED:
            specs = self.candidates(shape, options, Ceiling(keep * size, macs))
            near = [s for s in specs if self.network(shape, s).params >= NEAR * keep * size]
            for spec in _best(spectra, near or specs, FEW):
                found[_pairs(spec)] = None
        return list(found)

    def _closed_form_error(self, weight: Tensor, metric: Metric, spec: KroneckerSpec) -> float:
        network = self.network(matrix_shape(weight), spec)
        return closed_form(network, weight, metric, nearest(spec.terms, *_pairs(spec)))[1]


def _whitened(
    weight: Tensor, metric: Metric, out_split: Sequence[int], in_split: Sequence[int]
) -> Tensor:
    """Return W, ``(out, in)``, whitened over its modes."""
    sides = metric.modes(out_split, in_split)
    return whiten(as_tensor(weight, out_split, in_split), sides).reshape(weight.shape)


def _splits(shape: Shape, options: Mapping[str, Any]) -> Iterator[tuple[Split, Split]]:
    """Yield every pair of splits, or those in the options."""
    given_out = given_split("out_split", options, shape[0], (2,))
    given_in = given_split("in_split", options, shape[1], (2,))
    for out in [given_out] if given_out else divisor_pairs(shape[0]):
        for inp in [given_in] if given_in else divisor_pairs(shape[1]):
            yield (out[0], out[1]), (inp[0], inp[1])


def _most_terms(numbers: int, params: float, gauge: bool) -> float:
    """Return the largest t with ``t * numbers - t**2 <= params`` (no square without a gauge)."""
    if not gauge:
        return params // numbers
    root = numbers**2 - 4 * params
    return math.inf if root < 0 else (numbers - math.sqrt(root)) // 2


def _best(spectra: Spectra, specs: Sequence[KroneckerSpec], count: int) -> list[KroneckerSpec]:
    """Return the ``count`` specs of least error, and those that tie with them.

    If there are more, errors are estimated on a sample, except those of thin splits. A thin split
    that cannot be among the best is not computed.
    """
    if len(specs) <= count:
        return list(specs)
    floors = {s: spectra.floor(s.terms, *_pairs(s)) for s in specs if is_thin(*_pairs(s))}
    guesses = {s: spectra.estimate(s.terms, *_pairs(s)) for s in specs if s not in floors}
    for spec in sorted(floors, key=lambda spec: floors[spec]):
        if floors[spec] <= _bar(guesses, count):
            guesses[spec] = _tail(spectra, spec) ** 2
    bar = _bar(guesses, count)
    return [spec for spec in specs if guesses.get(spec, math.inf) <= bar]


def _bar(guesses: Mapping[KroneckerSpec, float], count: int) -> float:
    """Return the guess that ``count`` of them do not exceed."""
    smallest = heapq.nsmallest(count, guesses.values())
    return smallest[-1] + SCREEN_ROUNDING if len(smallest) == count else math.inf


def _tail(spectra: Spectra, spec: KroneckerSpec) -> float:
    return spectra.error(spec.terms, spec.out_split, spec.in_split)


def _pairs(spec: KroneckerSpec) -> tuple[Split, Split]:
    (a, b), (c, d) = spec.out_split, spec.in_split
    return (a, b), (c, d)


FORMAT = Kronecker()
