"""Block tensor train, also called Monarch: every block of the matrix has low rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.als import SWEEPS, als
from tnlm.decompositions.base import (
    Ceiling,
    Format,
    Shape,
    as_tensor,
    check_pairs,
    given_split,
    matrix_shape,
)
from tnlm.decompositions.screening import screened
from tnlm.decompositions.whitening import grown
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.linalg import rank_for, tails
from tnlm.tensors.network import Factors, Network
from tnlm.tensors.rearrange import Split, divisor_pairs

SPLITS = 32
"""Pairs of splits to try, those with the squarest blocks."""
WIDEST = 4
"""Most activations between the factors, as a multiple of the larger side: with smaller blocks,
moving activations takes longer than multiplying them."""
FINALISTS, TRIAL = 3, 2
"""Specs fitted, and sweeps for each, if the tails do not give the error."""


@dataclass(frozen=True)
class BlockTrainSpec:
    """The rank of every block, and the splits of outputs and inputs into (outer, inner).

    With splits (a, b) and (c, d), there are b * c blocks of shape (a, d).
    """

    rank: int
    out_split: tuple[int, ...]
    in_split: tuple[int, ...]


class BlockTrain(Format[BlockTrainSpec]):
    """A truncated SVD of every block ``W[:, b, c, :]``, of shape (a, d), of the split matrix.

    With splits (out, 1) x (1, in) it is ordinary low rank. It takes one multiply-add per parameter:
    both factors are block-diagonal matrices, up to a permutation of the modes. The Frobenius norm
    and metrics with diagonal sides do not couple blocks, so the fit is optimal under them, and its
    squared error is the sum of the blocks' tails. Under a full side, each block is fitted under its
    diagonal block of the side, and all are then refined by alternating least squares.

    Source: Monarch, Dao et al. 2022, arXiv 2204.00595 (rank 1, and the projection); block tensor
    train, Qiu et al. 2024, arXiv 2406.06248.

    Example:
        >>> weight = torch.randn(6, 4)
        >>> spec = BlockTrainSpec(rank=2, out_split=(2, 3), in_split=(2, 2))
        >>> factors = FORMAT.fit(weight, Metric(), spec)
        >>> bool(torch.allclose(FORMAT.reconstruct((6, 4), spec, factors), weight.double()))
        True
    """

    name = "block-train"
    title = "block tensor train (Monarch)"
    spec = BlockTrainSpec
    metrics = frozenset({"identity", "input", "separable", "elementwise"})

    def network(self, shape: Shape, spec: BlockTrainSpec) -> Network:
        """Return ``abcr,bcrd->abcd``, where b and c index the blocks."""
        check_pairs(shape, spec.out_split, spec.in_split)
        (a, b), (c, d) = spec.out_split, spec.in_split
        if spec.rank > min(a, d):
            raise RankError(
                f"rank={spec.rank}, but a {shape[0]}x{shape[1]} matrix with out_split={(a, b)}, "
                f"in_split={(c, d)} has {a}x{d} blocks, of rank 1 to {min(a, d)}",
                argument=("rank", "out_split", "in_split"),
            )
        sizes = {"a": a, "b": b, "c": c, "d": d, "r": spec.rank}
        return Network({"left": "abcr", "right": "bcrd"}, "ab", "cd", sizes)

    def fit(self, weight: Tensor, metric: Metric, spec: BlockTrainSpec) -> Factors:
        """Keep the leading singular vectors of every block, under its part of the metric.

        If the metric couples blocks, alternating least squares refine them.
        """
        return self._improved(weight, metric, spec, SWEEPS)

    def _improved(
        self, weight: Tensor, metric: Metric, spec: BlockTrainSpec, sweeps: int
    ) -> Factors:
        factors = _closed_form(weight, metric, spec)
        if _is_optimal(metric, spec):
            return factors
        network = self.network(matrix_shape(weight), spec)
        return als(network, weight, metric, factors, sweeps=sweeps).factors

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[BlockTrainSpec]:
        """Return, for the squarest blocks, the given rank or the most that the budget allows."""
        found = [
            spec
            for splits in _splits(shape, options)
            if (spec := self._largest(shape, splits, options, ceiling)) is not None
        ]
        if not found and options.get("rank") is not None:
            most = max(min(a, d) for (a, _), (_, d) in _splits(shape, options))
            if options["rank"] > most:
                raise RankError(
                    f"rank={options['rank']}; a {shape[0]}x{shape[1]} matrix has at most {most} "
                    "for any allowed split",
                    argument="rank",
                )
        return found[:SPLITS]

    def _largest(
        self,
        shape: Shape,
        splits: tuple[Split, Split],
        options: Mapping[str, Any],
        ceiling: Ceiling,
    ) -> BlockTrainSpec | None:
        (a, b), (c, d) = splits
        numbers = b * c * (a + d)  # parameters, and multiply-adds, per unit of rank
        most = int(min(a, d, ceiling.params // numbers, ceiling.macs // numbers))
        rank = options.get("rank") or most
        narrow = rank * b * c <= _most_between(shape, options)
        return BlockTrainSpec(rank, *splits) if 1 <= rank <= most and narrow else None

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[BlockTrainSpec]:
        """Return, for the squarest blocks, the smallest rank whose tail is within the tolerance.

        If the metric couples blocks, the tails are not a bound; the ranks of the ``FINALISTS``
        smallest specs then grow until the error of a trial fit is within the tolerance.
        """
        shape = matrix_shape(weight)
        splits = list(_splits(shape, options))[:SPLITS]
        energies = {pair: _energies(weight, metric, *pair) for pair in splits}

        def spec_at(pair: tuple[Split, Split], bound: float) -> BlockTrainSpec:
            return BlockTrainSpec(rank_for(energies[pair], bound), *pair)

        found = {pair: spec_at(pair, tolerance) for pair in splits}
        splits.sort(key=lambda pair: self.network(shape, found[pair]).params)
        loose = [pair for pair in splits if not _is_optimal(metric, found[pair])]
        for pair in loose[:FINALISTS]:
            found[pair] = grown(
                partial(spec_at, pair),
                lambda spec: self._error_after_trial(weight, metric, spec),
                tolerance,
            )
        return [found[pair] for pair in splits if pair not in loose[FINALISTS:]]

    def errors(
        self, weight: Tensor, metric: Metric, specs: Sequence[BlockTrainSpec]
    ) -> list[float]:
        """Return the sum of the blocks' tails for each spec.

        If the metric couples blocks, the ``FINALISTS`` with the smallest tails get the error after
        ``TRIAL`` sweeps, which the full fit can only lower; the others get infinity.
        """
        guesses = _tails(weight, specs, metric)
        loose = [k for k, spec in enumerate(specs) if not _is_optimal(metric, spec)]
        loose.sort(key=guesses.__getitem__)
        for rank, k in enumerate(loose):
            first = rank < FINALISTS
            guesses[k] = self._error_after_trial(weight, metric, specs[k]) if first else math.inf
        return guesses

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[BlockTrainSpec, float]]:
        """Return the best split at each of many sizes, predicted from the blocks' tails."""
        return screened(self, weight, metric, options, macs, _tails)

    def _error_after_trial(self, weight: Tensor, metric: Metric, spec: BlockTrainSpec) -> float:
        factors = self._improved(weight, metric, spec, TRIAL)
        return metric.relative(weight, self.reconstruct(matrix_shape(weight), spec, factors))


def _splits(shape: Shape, options: Mapping[str, Any]) -> Iterator[tuple[Split, Split]]:
    """Yield the pairs of splits that the options allow, squarest blocks first."""
    out = given_split("out_split", options, shape[0], (2,))
    inp = given_split("in_split", options, shape[1], (2,))
    pairs = [
        ((a, b), (c, d))
        for a, b in ([out] if out else divisor_pairs(shape[0]))
        for c, d in ([inp] if inp else divisor_pairs(shape[1]))
        if b * c <= _most_between(shape, options)
    ]
    # The singular vectors of square blocks capture the most per parameter.
    yield from sorted(pairs, key=lambda pair: _squareness(pair[0][0], pair[1][1]))


def _most_between(shape: Shape, options: Mapping[str, Any]) -> float:
    """Return the most activations allowed between the factors; infinity if the splits are given."""
    given = options.get("out_split") and options.get("in_split")
    return math.inf if given else WIDEST * max(shape)


def _squareness(a: int, d: int) -> tuple[float, int]:
    return max(a, d) / min(a, d), a


def _closed_form(weight: Tensor, metric: Metric, spec: BlockTrainSpec) -> Factors:
    """Return the best factors of every block separately, under its part of the metric."""
    outputs, scaled, whitened = _whiten(weight, metric, spec.out_split, spec.in_split)
    left = basis = _leading_outputs(whitened, spec.rank)
    if outputs:
        pairs = zip(outputs, basis, strict=True)
        left = torch.stack([side.unscale(rows.mT).mT for side, rows in pairs])
    return {"left": left.permute(2, 0, 1, 3), "right": basis.mT @ scaled}


def _whiten(
    weight: Tensor, metric: Metric, out_split: Sequence[int], in_split: Sequence[int]
) -> tuple[list[Side] | None, Tensor, Tensor]:
    """Return the side G of the rows for every b, ``G^(1/2) W``, and ``G^(1/2) W C^(1/2)``.

    W is the tensor of blocks ``(b, c, a, d)``; G and C are diagonal blocks of the metric's sides.
    """
    near = metric.start()
    outputs = _diagonal_blocks(near.outputs, out_split, 1) if near.outputs else None
    inputs = _diagonal_blocks(near.inputs, in_split, 0) if near.inputs else None
    scaled = as_tensor(weight, out_split, in_split).permute(1, 2, 0, 3)
    if outputs:
        pairs = zip(outputs, scaled, strict=True)
        scaled = torch.stack([side.scale(rows.mT).mT for side, rows in pairs])
    if not inputs:
        return outputs, scaled, scaled
    pairs = zip(inputs, scaled.unbind(1), strict=True)
    return outputs, scaled, torch.stack([side.scale(rows) for side, rows in pairs], dim=1)


def _diagonal_blocks(side: Side, split: Sequence[int], mode: int) -> list[Side]:
    """Return the side of the other mode of a split, for every index of ``mode``."""
    if side.is_diagonal:
        parts = side.values.reshape(*split).movedim(mode, 0)
    else:
        blocks = side.values.reshape(*split, *split)
        parts = blocks.diagonal(dim1=mode, dim2=mode + 2).movedim(-1, 0)
    return [Side(part) for part in parts]


def _leading_outputs(blocks: Tensor, rank: int) -> Tensor:
    """Return orthonormal bases ``(b, c, a, rank)`` of the blocks' leading left singular vectors."""
    if blocks.shape[-2] <= blocks.shape[-1]:
        vectors: Tensor = torch.linalg.eigh(blocks @ blocks.mT)[1]
        return vectors.flip(-1)[..., :rank]
    inputs = torch.linalg.eigh(blocks.mT @ blocks)[1].flip(-1)[..., :rank]
    basis: Tensor = torch.linalg.qr(blocks @ inputs)[0]
    return basis


def _energies(
    weight: Tensor, metric: Metric, out_split: Sequence[int], in_split: Sequence[int]
) -> Tensor:
    """Return the k-th squared singular values, summed over the blocks, largest first."""
    blocks = _whiten(weight, metric, out_split, in_split)[2]
    if blocks.shape[-2] > blocks.shape[-1]:
        blocks = blocks.mT
    values: Tensor = torch.linalg.eigvalsh(blocks @ blocks.mT)
    return values.clamp_min(0.0).sum((0, 1)).flip(0)


def _tails(
    weight: Tensor, specs: Sequence[BlockTrainSpec], metric: Metric | None = None
) -> list[float]:
    """Return the relative tail of each spec; each split is cut up once."""

    @cache
    def tail(out: Sequence[int], inp: Sequence[int]) -> Tensor:
        found = tails(_energies(weight, metric or Metric(), out, inp))
        return found / (float(found[0]) or 1.0)

    return [float(tail(spec.out_split, spec.in_split)[spec.rank]) ** 0.5 for spec in specs]


def _is_optimal(metric: Metric, spec: BlockTrainSpec) -> bool:
    """Return whether the closed form is optimal, since the metric does not couple blocks."""
    sides = (metric.outputs, spec.out_split[1]), (metric.inputs, spec.in_split[0])
    return metric.separable and all(
        side is None or side.is_diagonal or blocks == 1 for side, blocks in sides
    )


FORMAT = BlockTrain()
