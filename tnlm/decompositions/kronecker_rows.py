"""Kronecker products with whole rows: row v of a table is the sum over t of kron(A_t[v], B_t)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tnlm.decompositions.base import Ceiling, Format, Shape, check_split, given_split, matrix_shape
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.tensors.linalg import energies, rank_for, tails, truncated_svd
from tnlm.tensors.network import Factors, Network
from tnlm.tensors.rearrange import Split, divisor_pairs


@dataclass(frozen=True)
class KroneckerRowsSpec:
    """The number of products, and the split of a row into (outer, inner)."""

    terms: int
    in_split: tuple[int, ...]


class KroneckerRows(Format[KroneckerRowsSpec]):
    """The nearest sum of Kronecker products whose right factors are rows: E = sum A_t (x) B_t.

    A_t is (rows, c) and B_t is (1, d), so that a row is looked up in A only. Cut into pieces of
    length d, all rows form a matrix (rows * c, d); the fit is its truncated SVD. One term is
    KnGPT2's rule; a split (1, width) is ordinary low rank. Source: KnGPT2 (arXiv 2110.08152);
    several terms as in word2ket (arXiv 1911.04975) and Shapeshifter.

    Example:
        >>> import torch
        >>> table = torch.kron(torch.randn(10, 3), torch.randn(1, 2))
        >>> spec = KroneckerRowsSpec(terms=1, in_split=(3, 2))
        >>> factors = FORMAT.fit(table, Metric(), spec)
        >>> bool(torch.allclose(FORMAT.reconstruct((10, 6), spec, factors), table.double()))
        True
    """

    name = "kronecker-rows"
    title = "sum of Kronecker products with whole rows"
    spec = KroneckerRowsSpec
    kinds = frozenset({"embedding"})

    def network(self, shape: Shape, spec: KroneckerRowsSpec) -> Network:
        """Return ``vtc,td->vcd``, where v is the row."""
        if len(spec.in_split) != 2:
            raise RankError(
                f"in_split={spec.in_split}; allowed: two sizes, outer and inner",
                argument="in_split",
            )
        check_split("in_split", spec.in_split, shape[1])
        most = _most_terms(shape[0], spec.in_split)
        if spec.terms > most:
            raise RankError(
                f"terms={spec.terms}; a {shape[0]}x{shape[1]} table with in_split={spec.in_split} "
                f"allows 1 to {most}",
                argument=("terms", "in_split"),
            )
        outer, inner = spec.in_split
        sizes = {"v": shape[0], "t": spec.terms, "c": outer, "d": inner}
        return Network({"left": "vtc", "right": "td"}, "v", "cd", sizes)

    def fit(self, weight: Tensor, metric: Metric, spec: KroneckerRowsSpec) -> Factors:
        """Keep the leading singular triplets of the pieces, each side scaled by root sigma."""
        network = self.network(matrix_shape(weight), spec)
        rows, terms, outer = network.shape_of("left")
        svd = truncated_svd(weight.reshape(rows * outer, -1), spec.terms)
        root = svd.s.sqrt()
        left = (svd.u * root).reshape(rows, outer, terms).transpose(1, 2)
        return {"left": left, "right": root[:, None] * svd.vh}

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[KroneckerRowsSpec]:
        """Return, for every split, the given terms or the most that the budget allows.

        Only parameters are limited, since a row lookup is cheap in any format.
        """
        splits, asked = list(_splits(shape, options)), options.get("terms")
        limits = {split: _most_terms(shape[0], split) for split in splits}
        most = max(limits.values())
        if asked is not None and asked > most:
            raise RankError(
                f"terms={asked}; a {shape[0]}x{shape[1]} table has at most {most} for any allowed "
                "split",
                argument="terms",
            )
        found = []
        for (outer, inner), limit in limits.items():
            fitting = int(min(limit, ceiling.params // (shape[0] * outer + inner)))
            terms = fitting if asked is None else asked
            if 1 <= terms <= fitting:
                found.append(KroneckerRowsSpec(terms, (outer, inner)))
        return found

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[KroneckerRowsSpec]:
        """Return, for every split, the fewest terms whose tail is within the tolerance."""
        gram = _gram(weight)
        return [
            KroneckerRowsSpec(rank_for(_energy(gram, len(weight), split), tolerance), split)
            for split in _splits(matrix_shape(weight), options)
        ]

    def errors(
        self, weight: Tensor, metric: Metric, specs: Sequence[KroneckerRowsSpec]
    ) -> list[float]:
        """Return the tail of the pieces' spectrum for each spec (Eckart-Young)."""
        gram, found = _gram(weight), []
        for spec in specs:
            tail = tails(_energy(gram, len(weight), spec.in_split))
            found.append((float(tail[spec.terms]) / (float(tail[0]) or 1.0)) ** 0.5)
        return found


def _most_terms(rows: int, split: Sequence[int]) -> int:
    return min(rows * split[0], split[1])


def _splits(shape: Shape, options: Mapping[str, Any]) -> Iterator[Split]:
    """Yield every way to cut a row into pieces, or the one in the options."""
    given = given_split("in_split", options, shape[1], (2,))
    if given:
        yield given[0], given[1]
        return
    for outer, inner in divisor_pairs(shape[1]):
        if inner > 1 or shape[1] == 1:  # pieces of length 1 would be larger than the table
            yield outer, inner


def _gram(weight: Tensor) -> Tensor:
    weight = weight.detach().double()
    return weight.T @ weight


def _energy(gram: Tensor, rows: int, split: Sequence[int]) -> Tensor:
    """Return the squared singular values of the pieces, largest first.

    The Gram matrix of the pieces is the sum of diagonal blocks of the table's Gram matrix, which is
    computed once for all splits.
    """
    outer, inner = split
    blocks = gram.reshape(outer, inner, outer, inner)
    return energies(blocks.diagonal(dim1=0, dim2=2).sum(-1))[: _most_terms(rows, split)]


FORMAT = KroneckerRows()
