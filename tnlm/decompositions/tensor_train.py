"""Tensor train of a matrix (MPO): a chain of cores, each with one out mode and one in mode."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions import _tensorly
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
from tnlm.decompositions.screening import screened
from tnlm.decompositions.splits import balanced_split, largest_within, orders, ranks_at
from tnlm.decompositions.whitening import (
    Decompose,
    closed_form,
    grown,
    is_plain,
    whiten,
)
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.linalg import rank_for, spectrum, tails
from tnlm.tensors.network import Factors, Network

Split = tuple[int, ...]
OUT, IN, BOND = "abcdefg", "hijklmn", "opqrstu"
ORDERS = (2, 3)
"""Numbers of cores to try if no split is given."""


@dataclass(frozen=True)
class TensorTrainSpec:
    """The modes of outputs and inputs, one pair per core, and the rank of every inner bond."""

    out_split: tuple[int, ...]
    in_split: tuple[int, ...]
    ranks: tuple[int, ...]


class TensorTrain(Format[TensorTrainSpec]):
    """TT-SVD of the matrix, reshaped so that core k has out mode k and in mode k.

    The squared error is at most the sum of the tails of the unfoldings, hence the error is within a
    factor sqrt(cores - 1) of the best. Two cores are a sum of Kronecker products.

    Example:
        >>> import torch
        >>> weight = torch.randn(6, 4)
        >>> spec = TensorTrainSpec(out_split=(2, 3), in_split=(2, 2), ranks=(4,))
        >>> factors = FORMAT.fit(weight, Metric(), spec)
        >>> bool(torch.allclose(FORMAT.reconstruct((6, 4), spec, factors), weight.double()))
        True
    """

    name = "tensor-train"
    title = "tensor train of the matrix (MPO)"
    spec = TensorTrainSpec
    metrics = frozenset({"identity", "input", "separable", "elementwise"})

    def network(self, shape: Shape, spec: TensorTrainSpec) -> Network:
        """Return a chain of cores ``core0 .. core<d-1>``."""
        check_split("out_split", spec.out_split, shape[0])
        check_split("in_split", spec.in_split, shape[1])
        order = len(spec.out_split)
        if (
            not 2 <= order <= len(OUT)
            or len(spec.in_split) != order
            or len(spec.ranks) != order - 1
        ):
            raise RankError(
                f"out_split={spec.out_split}, in_split={spec.in_split}, ranks={spec.ranks}; "
                f"allowed: splits of equal length, 2 to {len(OUT)}, and one rank fewer",
                argument=("out_split", "in_split", "ranks"),
            )
        limits = _limits(spec.out_split, spec.in_split)
        if any(rank > limit for rank, limit in zip(spec.ranks, limits, strict=True)):
            raise RankError(
                f"ranks={spec.ranks}; these splits allow at most {limits}", argument="ranks"
            )
        ranks = dict(zip(BOND, spec.ranks, strict=False))
        return chain_of_cores(spec.out_split, spec.in_split, ["", *ranks, ""], ranks)

    def fit(self, weight: Tensor, metric: Metric, spec: TensorTrainSpec) -> Factors:
        """Sweep TT-SVD from the first core to the last.

        With data, the sweep is over the whitened matrix, and is then refined by alternating least
        squares.
        """
        network = self.network(matrix_shape(weight), spec)
        factors = fit_network(network, weight, metric, _tt_svd(network, spec))
        return factors if is_plain(metric) else orthogonal(factors)

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[TensorTrainSpec]:
        """Return, for each split, the given ranks or the largest common cap that fits."""
        found = []
        for out, inp in _splits(shape, options):

            def fits(ranks: tuple[int, ...], out: Split = out, inp: Split = inp) -> bool:
                return ceiling.allows(self.network(shape, TensorTrainSpec(out, inp, ranks)))

            ranks = largest_within(ranks_at(_limits(out, inp), options), fits)
            if ranks is not None:
                found.append(TensorTrainSpec(out, inp, ranks))
        return found

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[TensorTrainSpec]:
        """Return ranks that allow ``tolerance / sqrt(cores - 1)`` per unfolding (Oseledets).

        With data, the unfoldings are of the whitened matrix and give no bound, so the ranks grow
        until the measured error is within the tolerance.
        """
        found = []
        for out, inp in _splits(matrix_shape(weight), options):
            whitened = whiten(as_tensor(weight, out, inp), metric.modes(out, inp))
            spectra = [spectrum(rows) for rows in _unfoldings(whitened)]

            def spec_at(
                bound: float,
                out: Split = out,
                inp: Split = inp,
                spectra: Sequence[Tensor] = spectra,
            ) -> TensorTrainSpec:
                share = bound / math.sqrt(len(out) - 1)
                return TensorTrainSpec(out, inp, tuple(rank_for(e, share) for e in spectra))

            if is_plain(metric):
                found.append(spec_at(tolerance))
            else:
                error_of = partial(self._closed_form_error, weight, metric)
                found.append(grown(spec_at, error_of, tolerance))
        return found

    def errors(
        self, weight: Tensor, metric: Metric, specs: Sequence[TensorTrainSpec]
    ) -> list[float]:
        """Return the error of each spec's TT-SVD, which least squares can only lower."""
        return [self._closed_form_error(weight, metric, spec) for spec in specs]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[TensorTrainSpec, float]]:
        """Return the best ranks at each of many sizes, predicted from the unfoldings' tails."""
        return screened(self, weight, metric, options, macs, _bounds)

    def _closed_form_error(self, weight: Tensor, metric: Metric, spec: TensorTrainSpec) -> float:
        network = self.network(matrix_shape(weight), spec)
        return closed_form(network, weight, metric, _tt_svd(network, spec))[1]


def _tt_svd(network: Network, spec: TensorTrainSpec) -> Decompose:
    """Return a function that fits a tensor (out modes, then in modes) in the Frobenius norm."""

    def decompose(tensor: Tensor) -> Factors:
        cores = _tensorly.tt_matrix(tensor, spec.ranks)
        return {
            name: core.reshape(network.shape_of(name))
            for name, core in zip(network.factors, cores, strict=True)
        }

    return decompose


def _bounds(weight: Tensor, specs: Sequence[TensorTrainSpec]) -> list[float]:
    """Return the bound on each spec's error: the tails at all bonds, each computed once."""

    @cache
    def at_bonds(out: Split, inp: Split) -> list[Tensor]:
        return [tails(spectrum(rows)) for rows in _unfoldings(as_tensor(weight, out, inp))]

    found = []
    for spec in specs:
        bonds = at_bonds(spec.out_split, spec.in_split)
        lost = sum(float(tail[rank]) for tail, rank in zip(bonds, spec.ranks, strict=True))
        found.append(min(lost / (float(bonds[0][0]) or 1.0), 1.0) ** 0.5)
    return found


def chain_of_cores(
    out: Sequence[int], inp: Sequence[int], bonds: Sequence[str], ranks: Mapping[str, int]
) -> Network:
    """Return cores ``core0 .. core<d-1>``, of which core k has bonds k and k + 1.

    Args:
        out: sizes of the out modes, one a core.
        inp: sizes of the in modes, one a core.
        bonds: names from ``BOND``, one more than cores; empty for none, the first again for a ring.
        ranks: size of every bond.

    Example:
        >>> chain_of_cores((2, 3), (2, 2), ["", "o", ""], {"o": 4}).equation
        'aho,obi->abhi'
    """
    order = len(out)
    sizes = dict(zip(OUT, out, strict=False)) | dict(zip(IN, inp, strict=False)) | dict(ranks)
    factors = {f"core{k}": bonds[k] + OUT[k] + IN[k] + bonds[k + 1] for k in range(order)}
    return Network(factors, OUT[:order], IN[:order], sizes)


def orthogonal(factors: Factors) -> Factors:
    """Return the same chain with all cores but the last orthonormal, as TT-SVD leaves it."""
    found = dict(factors)
    for name, following in itertools.pairwise(factors):
        core = found[name]
        q, r = torch.linalg.qr(core.reshape(-1, core.shape[-1]))
        found[name] = q.reshape(core.shape)
        found[following] = torch.tensordot(r, found[following], 1)
    return found


def _splits(
    shape: Shape, options: Mapping[str, Any]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    out = given_split("out_split", options, shape[0], range(2, len(OUT) + 1))
    inp = given_split("in_split", options, shape[1], range(2, len(IN) + 1))
    if out and inp and len(out) != len(inp):
        raise RankError(
            f"out_split={out}, in_split={inp}; allowed: splits of equal length",
            argument=("out_split", "in_split"),
        )
    known = out or inp
    for order in (len(known),) if known else orders(options, ORDERS):
        yield out or balanced_split(shape[0], order), inp or balanced_split(shape[1], order)


def _limits(out: Sequence[int], inp: Sequence[int]) -> tuple[int, ...]:
    """Return the largest rank that each inner bond can have."""
    pairs = [a * b for a, b in zip(out, inp, strict=True)]
    return tuple(min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(1, len(pairs)))


def _unfoldings(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the unfolding at every inner bond."""
    order = tensor.dim() // 2
    paired = tensor.permute([axis for k in range(order) for axis in (k, order + k)])
    sizes = [paired.shape[2 * k] * paired.shape[2 * k + 1] for k in range(order)]
    for k in range(1, order):
        yield paired.reshape(math.prod(sizes[:k]), -1)


FORMAT = TensorTrain()
