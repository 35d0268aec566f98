"""Per-token MPS of an embedding: every row is its own tensor train."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tnlm.decompositions.als import fit_network
from tnlm.decompositions.base import Ceiling, Format, Shape, check_split, given_split, matrix_shape
from tnlm.decompositions.splits import balanced_split, largest_within, orders, ranks_at
from tnlm.decompositions.whitening import grown, is_plain
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.linalg import rank_for
from tnlm.tensors.network import Factors, Network

MODES, BOND = "abcdefghijkl", "mnopqrstuvw"
ORDERS = (2, 3, 4)
"""Numbers of modes to try if no split is given."""
SAMPLE = 512
"""Number of rows on which splits are compared."""
CHUNK = 4096
"""Number of rows decomposed at once."""


@dataclass(frozen=True)
class TokenMPSSpec:
    """The modes of one row, and the rank of every inner bond, the same for all rows."""

    in_split: tuple[int, ...]
    ranks: tuple[int, ...]


class TokenMPS(Format[TokenMPSSpec]):
    """TT-SVD of each row, batched over the rows; tokens share no parameters.

    Changing one row changes only its own cores. Source: TensorGPT (arXiv 2307.00526). tensorly has
    no batched tensor train, so the sweep is implemented here; each row's result is tensorly's.

    Example:
        >>> table = torch.randn(10, 6)
        >>> spec = TokenMPSSpec(in_split=(2, 3), ranks=(2,))
        >>> factors = FORMAT.fit(table, Metric(), spec)
        >>> bool(torch.allclose(FORMAT.reconstruct((10, 6), spec, factors), table.double()))
        True
    """

    name = "token-mps"
    title = "one tensor train (MPS) for every row"
    spec = TokenMPSSpec
    metrics = frozenset({"identity", "tokens"})
    kinds = frozenset({"embedding"})

    def network(self, shape: Shape, spec: TokenMPSSpec) -> Network:
        """Return ``zap,zpbq,...->zab..``, where z is the row."""
        check_split("in_split", spec.in_split, shape[1])
        order = len(spec.in_split)
        if not 2 <= order <= len(MODES) or len(spec.ranks) != order - 1:
            raise RankError(
                f"in_split={spec.in_split}, ranks={spec.ranks}; "
                f"allowed: 2 to {len(MODES)} modes and one rank fewer",
                argument=("in_split", "ranks"),
            )
        limits = _limits(spec.in_split)
        if any(rank > limit for rank, limit in zip(spec.ranks, limits, strict=True)):
            raise RankError(
                f"ranks={spec.ranks}; in_split={spec.in_split} allows at most {limits}",
                argument=("ranks", "in_split"),
            )
        sizes = {"z": shape[0]} | dict(zip(MODES, spec.in_split, strict=False))
        sizes |= dict(zip(BOND, spec.ranks, strict=False))
        bonds = ["", *BOND[: order - 1], ""]
        factors = {f"core{k}": "z" + bonds[k] + MODES[k] + bonds[k + 1] for k in range(order)}
        return Network(factors, "z", MODES[:order], sizes)

    def fit(self, weight: Tensor, metric: Metric, spec: TokenMPSSpec) -> Factors:
        """Sweep a batched TT-SVD over the modes, ``CHUNK`` rows at a time.

        Under a metric whose row side is diagonal, the sweep is also of the whitened rows, and
        alternating least squares improve the better result.
        """
        network = self.network(matrix_shape(weight), spec)
        starts = range(0, len(weight), CHUNK)
        parts = [
            self._chunk(weight[k : k + CHUNK], _of_rows(metric, slice(k, k + CHUNK)), spec)
            for k in starts
        ]
        cores = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        return {
            name: core.reshape(network.shape_of(name))
            for name, core in zip(network.factors, cores, strict=True)
        }

    def _chunk(self, rows: Tensor, metric: Metric, spec: TokenMPSSpec) -> list[Tensor]:
        network = self.network(matrix_shape(rows), spec)

        def sweep(tensor: Tensor) -> Factors:
            cores = _sweep(tensor.reshape(len(rows), -1), spec)
            pairs = zip(network.factors, cores, strict=True)
            return {name: core.reshape(network.shape_of(name)) for name, core in pairs}

        factors = fit_network(network, rows, metric, sweep)
        return [factors[name] for name in network.factors]

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[TokenMPSSpec]:
        """Return, for each split, the given ranks or the largest common cap that fits.

        Only parameters are limited, since a row lookup is cheap in any format.
        """
        storage = Ceiling(params=ceiling.params)
        found = []
        for split in _splits(shape, options):

            def fits(ranks: tuple[int, ...], split: tuple[int, ...] = split) -> bool:
                return storage.allows(self.network(shape, TokenMPSSpec(split, ranks)))

            ranks = largest_within(ranks_at(_limits(split), options), fits)
            if ranks is not None:
                found.append(TokenMPSSpec(split, ranks))
        return found

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[TokenMPSSpec]:
        """Return ranks that allow ``tolerance / sqrt(modes - 1)`` per unfolding, over all rows.

        Under a metric, the unfoldings are of the whitened rows and give no bound, so the ranks grow
        until the error measured on evenly spaced rows is within the tolerance.
        """
        found, whitened = [], metric.whiten(weight)
        for split in _splits(matrix_shape(weight), options):

            def spec_at(bound: float, split: tuple[int, ...] = split) -> TokenMPSSpec:
                share = bound / math.sqrt(len(split) - 1)
                ranks = tuple(
                    rank_for(_pooled_energy(whitened, math.prod(split[:k])), share)
                    for k in range(1, len(split))
                )
                return TokenMPSSpec(split, ranks)

            if is_plain(metric):
                found.append(spec_at(tolerance))
            else:
                found.append(
                    grown(spec_at, lambda s: self.errors(weight, metric, [s])[0], tolerance)
                )
        return found

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[TokenMPSSpec]) -> list[float]:
        """Return the relative error of each spec, measured on evenly spaced rows."""
        chosen = slice(None, None, max(len(weight) // SAMPLE, 1))
        return super().errors(weight.detach()[chosen], _of_rows(metric, chosen), specs)


def _of_rows(metric: Metric, chosen: slice) -> Metric:
    """Return the metric of some rows of a table, whose row side is diagonal."""
    if metric.outputs is None:
        return metric
    return Metric(Side(metric.outputs.values[chosen]), metric.inputs)


def _sweep(rows: Tensor, spec: TokenMPSSpec) -> list[Tensor]:
    """Return the cores ``(rows, rank, mode, rank)`` of a batch of rows."""
    count, rank, rest, cores = len(rows), 1, rows, []
    for size, following in zip(spec.in_split, spec.ranks, strict=False):
        unfolding = rest.reshape(count, rank * size, -1)
        u, s, vh = torch.linalg.svd(unfolding, full_matrices=False)
        kept = min(following, s.shape[1])
        core = u.new_zeros(count, rank, size, following)
        core[..., :kept] = u[..., :kept].reshape(count, rank, size, kept)
        rest = u.new_zeros(count, following, unfolding.shape[2])
        rest[:, :kept] = s[:, :kept, None] * vh[:, :kept]
        cores.append(core)
        rank = following
    return [*cores, rest.reshape(count, rank, spec.in_split[-1], 1)]


def _pooled_energy(weight: Tensor, left: int) -> Tensor:
    """Return the squared singular values of the rows' unfoldings, summed over the rows."""
    parts = weight.detach().split(CHUNK)
    return sum(
        (
            torch.linalg.svdvals(part.double().reshape(len(part), left, -1)).square().sum(0)
            for part in parts
        ),
        start=weight.new_zeros(1, dtype=torch.float64),
    )


def _splits(shape: Shape, options: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    given = given_split("in_split", options, shape[1], range(2, len(MODES) + 1))
    found = (balanced_split(shape[1], order) for order in orders(options, ORDERS))
    yield from [given] if given else dict.fromkeys(found)


def _limits(split: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(math.prod(split[:k]), math.prod(split[k:])) for k in range(1, len(split)))


FORMAT = TokenMPS()
