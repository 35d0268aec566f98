"""Sum of Kronecker products: W = sum over t of kron(left[t], right[t])."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
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
from tnlm.decompositions.whitening import (
    Decompose,
    closed_form,
    grown,
    is_plain,
    whiten,
)
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.costs import macs
from tnlm.tensors.linalg import energies, rank_for, spectrum, tails, truncated_svd
from tnlm.tensors.network import Factors, Gauge, Network
from tnlm.tensors.rearrange import Split, divisor_pairs, rearrange, sample

FINALISTS = 12
"""Number of splits scored exactly, after all are screened on a sample."""

SCREEN_ENTRIES = 2**15
"""Approximate number of matrix entries used to screen one split."""
LARGE = 1e12
"""Entries up to this size have sums of squares far from overflow in float32."""

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
        factors = fit_network(network, weight, metric, _nearest(spec))
        return factors if is_plain(metric) else _balanced(factors)

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
        if len(specs) > FINALISTS:
            guesses = _screen_all(weight, metric, specs)
            bar = sorted(guesses)[FINALISTS - 1] + SCREEN_ROUNDING
        else:
            guesses, bar = [0.0] * len(specs), 0.0
        return [
            self._tail(weight, metric, spec) if guess <= bar else math.inf
            for spec, guess in zip(specs, guesses, strict=True)
        ]

    def _tail(self, weight: Tensor, metric: Metric, spec: KroneckerSpec) -> float:
        splits = spec.out_split, spec.in_split
        tail = tails(spectrum(rearrange(_whitened(weight, metric, *splits), *splits)))
        error: float = (float(tail[spec.terms]) / (float(tail[0]) or 1.0)) ** 0.5
        return error

    def _closed_form_error(self, weight: Tensor, metric: Metric, spec: KroneckerSpec) -> float:
        network = self.network(matrix_shape(weight), spec)
        return closed_form(network, weight, metric, _nearest(spec))[1]


def _nearest(spec: KroneckerSpec) -> Decompose:
    """Return a function that fits a tensor of modes (a, b, c, d) in the Frobenius norm."""
    (a, b), (c, d) = spec.out_split, spec.in_split

    def decompose(tensor: Tensor) -> Factors:
        rows = rearrange(tensor.reshape(a * b, c * d), spec.out_split, spec.in_split)
        svd = truncated_svd(rows, spec.terms)
        root = svd.s.sqrt()
        return {
            "left": (svd.u * root).T.reshape(-1, a, c),
            "right": (root[:, None] * svd.vh).reshape(-1, b, d),
        }

    return decompose


def _balanced(factors: Factors) -> Factors:
    """Return the same sum with orthogonal terms, with both sides scaled by the root of sigma."""
    left, right = factors["left"], factors["right"]
    outer, r_outer = torch.linalg.qr(left.flatten(1).T)
    inner, r_inner = torch.linalg.qr(right.flatten(1).T)
    svd = truncated_svd(r_outer @ r_inner.T, method="exact")
    root = svd.s.sqrt()
    return {
        "left": (outer @ (svd.u * root)).T.reshape(left.shape),
        "right": (root[:, None] * (svd.vh @ inner.T)).reshape(right.shape),
    }


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


def _screen_all(weight: Tensor, metric: Metric, specs: Sequence[KroneckerSpec]) -> list[float]:
    """Screen every spec; whiten the inputs once per input split."""
    if is_plain(metric):
        return [_screen(weight, spec) for spec in specs]
    near, guesses = metric.start(), {}
    for inp in dict.fromkeys(spec.in_split for spec in specs):
        inputs = _whitened(weight, Metric(inputs=near.inputs), weight.shape[:1], inp)
        for spec in (spec for spec in specs if spec.in_split == inp):
            both = _whitened(inputs, Metric(outputs=near.outputs), spec.out_split, inp)
            guesses[spec] = _screen(both, spec)
    return [guesses[spec] for spec in specs]


def _screen(weight: Tensor, spec: KroneckerSpec) -> float:
    """Estimate the relative squared error from evenly spaced blocks of the matrix."""
    (a, b), (c, d) = spec.out_split, spec.in_split
    short = min(a * c, b * d)
    rows = sample(weight, (a, b), (c, d), max(4 * spec.terms, SCREEN_ENTRIES // short))
    rows = _in_range(rows).float()
    if rows.shape[0] > rows.shape[1]:
        rows = rows.T
    total = float(rows.square().sum())
    width = spec.terms + 8
    if 4 * width < rows.shape[0]:
        # One power iteration finds the leading subspace, cheaper than all eigenvalues.
        start = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(rows @ start.to(rows))[0]
        basis = torch.linalg.qr(rows @ (rows.T @ basis))[0]
        rows = basis.T @ rows
    kept = float(energies(rows @ rows.T)[: spec.terms].sum())
    return 1.0 - kept / total if total > 0 else 0.0


def _in_range(rows: Tensor) -> Tensor:
    """Scale rows whose squares would overflow or underflow float32; return others unchanged."""
    largest = float(rows.abs().max()) if rows.numel() else 0.0
    outside = largest > LARGE or 0.0 < largest < 1.0 / LARGE
    return rows.double() / largest if outside else rows


FORMAT = Kronecker()
