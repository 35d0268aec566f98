"""Tensor ring of a matrix: a tensor train with one more bond between the last and first core."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tnlm.decompositions.screening import screened
from tnlm.decompositions.splits import balanced_split, largest_within
from tnlm.decompositions.tensor_train import BOND, OUT, chain_of_cores, orthogonal
from tnlm.decompositions.whitening import Decompose, closed_form, grown, whiten
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.linalg import rank_for, spectrum, truncated_svd
from tnlm.tensors.network import Factors, Network

Split = tuple[int, ...]
ORDER = 3
"""Default and fewest cores; a ring of two is a sum of Kronecker products."""
CLOSING = (1, 2, 4)
"""Ranks of the closing bond to try if none is given; 1 is the tensor train."""
SWEEPS, STALL = 40, 1e-3
"""Most sweeps of least squares, and the gain below which one is the last; trains need fewer."""
WIDEST = 512
"""Rings with a larger product of two adjacent ranks keep their TR-SVD: every half-step would need
the eigenvectors of a matrix of this size."""


@dataclass(frozen=True)
class TensorRingSpec:
    """The modes of outputs and inputs, one pair per core, and the rank of every bond.

    ``ranks[k]`` is the rank of the bond before core k, so ``ranks[0]`` closes the ring.
    """

    out_split: tuple[int, ...]
    in_split: tuple[int, ...]
    ranks: tuple[int, ...]


class TensorRing(Format[TensorRingSpec]):
    """TR-SVD of the matrix, then alternating least squares, which never increase the error.

    Core k has out mode k and in mode k, as in a tensor train; with ``ranks[0] = 1`` it is one. The
    first unfolding is truncated to rank ``ranks[0] * ranks[1]``, which its pair of modes bounds.
    Least squares end at a local minimum, which may not be the best. No bond is gauge-fixed, as in a
    train, since a network can fix only one.

    Source: Zhao et al. 2016, arXiv 1606.05535.

    Example:
        >>> import torch
        >>> weight = torch.randn(8, 8)
        >>> spec = TensorRingSpec(out_split=(2, 2, 2), in_split=(2, 2, 2), ranks=(2, 2, 8))
        >>> factors = FORMAT.fit(weight, Metric(), spec)
        >>> bool(torch.allclose(FORMAT.reconstruct((8, 8), spec, factors), weight.double()))
        True
    """

    name = "tensor-ring"
    title = "tensor ring of the matrix"
    spec = TensorRingSpec
    metrics = frozenset({"identity", "input", "separable", "elementwise"})
    copies = 20.0

    def network(self, shape: Shape, spec: TensorRingSpec) -> Network:
        """Return a ring of cores ``core0 .. core<d-1>``; a closing bond of rank 1 is left out."""
        check_split("out_split", spec.out_split, shape[0])
        check_split("in_split", spec.in_split, shape[1])
        order = len(spec.out_split)
        same = len(spec.in_split) == len(spec.ranks) == order
        if not same or not ORDER <= order <= len(OUT):
            raise RankError(
                f"out_split={spec.out_split}, in_split={spec.in_split}, ranks={spec.ranks}; "
                f"allowed: as many ranks as sizes in each split, {ORDER} to {len(OUT)}",
                argument=("out_split", "in_split", "ranks"),
            )
        most = _capped(_pairs(spec.out_split, spec.in_split), spec.ranks)
        if most != spec.ranks:
            raise RankError(
                f"ranks={spec.ranks}; these splits allow at most {most}: TR-SVD makes no larger "
                "ones, and its first two multiply to at most the size of the first mode",
                argument="ranks",
            )
        ranks = dict(zip(BOND, spec.ranks, strict=False))
        closing = BOND[0] if spec.ranks[0] > 1 else ""
        bonds = [closing, *BOND[1:order], closing]
        return chain_of_cores(spec.out_split, spec.in_split, bonds, ranks)

    def fit(self, weight: Tensor, metric: Metric, spec: TensorRingSpec) -> Factors:
        """Start from the TR-SVD (with data, also of the whitened matrix), then least squares.

        All cores but the last get orthonormal columns towards the next core.
        """
        network = self.network(matrix_shape(weight), spec)
        start, _ = closed_form(network, weight, metric, _tr_svd(network, spec))
        sweeps = SWEEPS if _widest(spec) <= WIDEST else 0
        return orthogonal(als(network, weight, metric, start, sweeps=sweeps, stall=STALL).factors)

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[TensorRingSpec]:
        """Return the given ranks, or for each closing rank the largest common cap that fits."""
        found = []
        out, inp = _split(shape, options)
        for ranks_at in _growths(_pairs(out, inp), options):

            def fits(ranks: tuple[int, ...]) -> bool:
                return ceiling.allows(self.network(shape, TensorRingSpec(out, inp, ranks)))

            ranks = largest_within(ranks_at, fits)
            if ranks is not None:
                found.append(TensorRingSpec(out, inp, ranks))
        return list(dict.fromkeys(found))

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[TensorRingSpec]:
        """Return, for each closing rank, ranks that allow an equal error per cut of the TR-SVD.

        With data, the cuts are of the whitened matrix and give no bound, so the ranks grow until
        the measured error is within the tolerance.
        """
        shape = matrix_shape(weight)
        out, inp = _split(shape, options)
        tensor = whiten(as_tensor(weight, out, inp), metric.modes(out, inp))
        found = []
        for closing in _closings(_pairs(out, inp), options):

            def spec_at(bound: float, closing: int = closing) -> TensorRingSpec:
                return TensorRingSpec(out, inp, _ranks_within(tensor, closing, bound))

            def error_of(spec: TensorRingSpec) -> float:
                network = self.network(shape, spec)
                return closed_form(network, weight, metric, _tr_svd(network, spec))[1]

            found.append(grown(spec_at, error_of, tolerance))
        return list(dict.fromkeys(found))

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[TensorRingSpec, float]]:
        """Return the best ranks at each of many sizes, predicted by TR-SVDs of the whitened W."""

        def error(matrix: Tensor, norm: Metric, spec: TensorRingSpec) -> float:
            network = self.network(matrix_shape(matrix), spec)
            return closed_form(network, matrix, norm, _tr_svd(network, spec))[1]

        def guess(whitened: Tensor, specs: Sequence[TensorRingSpec]) -> list[float]:
            return [error(whitened, Metric(), spec) for spec in specs]

        return screened(self, weight, metric, options, macs, guess, partial(error, weight, metric))


def _tr_svd(network: Network, spec: TensorRingSpec) -> Decompose:
    """Return a function that fits a tensor (out, then in modes) by one truncated SVD per bond."""

    def decompose(tensor: Tensor) -> Factors:
        rest, core = _first_cut(tensor, spec.ranks[0], spec.ranks[0] * spec.ranks[1])
        cores = [core]
        for k in range(1, len(spec.ranks) - 1):
            rows = rest.reshape(spec.ranks[k] * _width(tensor, k), -1)
            svd = truncated_svd(rows, spec.ranks[k + 1])
            cores.append(svd.u)
            rest = svd.s[:, None] * svd.vh
        return {
            name: core.reshape(network.shape_of(name))
            for name, core in zip(network.factors, [*cores, rest], strict=True)
        }

    return decompose


def _widest(spec: TensorRingSpec) -> int:
    """Return the largest product of two adjacent ranks of a ring; 1 for a train."""
    bonds = itertools.pairwise((*spec.ranks, spec.ranks[0]))
    return max(a * b for a, b in bonds) if spec.ranks[0] > 1 else 1


def _first_cut(tensor: Tensor, closing: int, rank: int) -> tuple[Tensor, Tensor]:
    """Cut off the first core; return the rest, with the closing bond last, and the core."""
    svd = truncated_svd(_paired(tensor), rank)
    core = svd.u.reshape(-1, closing, rank // closing).movedim(1, 0)
    rest = (svd.s[:, None] * svd.vh).reshape(closing, rank // closing, -1).movedim(0, -1)
    return rest, core


def _paired(tensor: Tensor) -> Tensor:
    """Return the matrix of the first pair of modes by all other pairs, in order."""
    order = tensor.dim() // 2
    paired = tensor.permute([axis for k in range(order) for axis in (k, order + k)])
    return paired.reshape(_width(tensor, 0), -1)


def _width(tensor: Tensor, core: int) -> int:
    """Return the size of a core's pair of modes."""
    return tensor.shape[core] * tensor.shape[tensor.dim() // 2 + core]


def _ranks_within(tensor: Tensor, closing: int, bound: float) -> tuple[int, ...]:
    """Return the ranks of a TR-SVD whose relative error is within a bound."""
    order = tensor.dim() // 2
    share = bound * float(tensor.norm()) / math.sqrt(order - 1)
    first = _rank_within(_paired(tensor), share)
    ranks = [closing, math.ceil(first / closing)]
    rest, _ = _first_cut(tensor, closing, ranks[0] * ranks[1])
    for k in range(1, order - 1):
        matrix = rest.reshape(ranks[k] * _width(tensor, k), -1)
        ranks.append(_rank_within(matrix, share))
        svd = truncated_svd(matrix, ranks[-1])
        rest = svd.s[:, None] * svd.vh
    return tuple(ranks)


def _rank_within(matrix: Tensor, error: float) -> int:
    norm = float(matrix.norm())
    return rank_for(spectrum(matrix), error / norm) if norm else 1


def _split(shape: Shape, options: Mapping[str, Any]) -> tuple[Split, Split]:
    """Return the given splits, or balanced ones, with a core per rank if several are given."""
    orders = range(ORDER, len(OUT) + 1)
    out = given_split("out_split", options, shape[0], orders)
    inp = given_split("in_split", options, shape[1], orders)
    if out and inp and len(out) != len(inp):
        raise RankError(
            f"out_split={out}, in_split={inp}; allowed: splits of equal length",
            argument=("out_split", "in_split"),
        )
    ranks = tuple(options.get("ranks") or ())
    order = len(out or inp or (ranks if len(ranks) > 1 else range(ORDER)))
    if order not in orders or len(ranks) not in (0, 1, order):
        raise RankError(
            f"ranks={ranks} for {order} cores; allowed: one rank for all bonds, or one per core, "
            f"{orders[0]} to {orders[-1]} cores",
            argument="ranks",
        )
    return out or balanced_split(shape[0], order), inp or balanced_split(shape[1], order)


def _pairs(out: Sequence[int], inp: Sequence[int]) -> list[int]:
    return [a * b for a, b in zip(out, inp, strict=True)]


def _capped(pairs: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Lower ranks to what TR-SVD can use, given the shape of every matrix that it truncates."""
    first = min(pairs[0], math.prod(pairs[1:]))
    closing = min(ranks[0], first)
    found = [closing, min(ranks[1], first // closing)]
    for k in range(2, len(pairs)):
        found.append(min(ranks[k], found[-1] * pairs[k - 1], math.prod(pairs[k:]) * closing))
    return tuple(found)


def _closings(pairs: Sequence[int], options: Mapping[str, Any]) -> Sequence[int]:
    """Return the closing ranks to try: the one given, or those that divide the first cut."""
    given: Sequence[int] = options.get("ranks") or []
    if len(given) > 1:
        return given[:1]
    first = min(pairs[0], math.prod(pairs[1:]))
    most = given[0] if given else first
    return [closing for closing in CLOSING if closing <= most and first % closing == 0]


def _growths(
    pairs: Sequence[int], options: Mapping[str, Any]
) -> Iterator[Callable[[float], tuple[int, ...]]]:
    """Yield functions from a scale to ranks: fixed if given, else a cap on all but the closing."""
    given = tuple(options.get("ranks") or ())
    if len(given) > 1:
        yield lambda _: given
        return
    for closing in _closings(pairs, options):
        most = max(_capped(pairs, (closing, *[math.prod(pairs)] * (len(pairs) - 1))))

        def ranks_at(scale: float, closing: int = closing, most: int = most) -> tuple[int, ...]:
            cap = given[0] if given else max(1, round(scale * most))
            return _capped(pairs, (closing, *[cap] * (len(pairs) - 1)))

        yield ranks_at


FORMAT = TensorRing()
