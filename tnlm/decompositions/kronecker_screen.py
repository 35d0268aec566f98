"""Spectra of all Kronecker splits of one matrix, each computed once or estimated on a sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnlm.tensors.linalg import energies, spectrum, tails
from tnlm.tensors.rearrange import Split, rearrange, sample

SCREEN_ENTRIES = 2**15
"""Approximate number of matrix entries used to screen one split."""
SHARED = 4096
"""Longest side of a matrix over which one Gram matrix is formed for all thin splits."""
LARGE = 1e12
"""Entries up to this size have sums of squares far from overflow in float32."""


class Spectra:
    """The relative tails of the rearrangements R(W) of one matrix.

    If one of both factors is a vector, the Gram matrix of R(W) is a partial trace of that of W, so
    that such thin splits cost no product of their own, unless W is so long that this takes much
    memory.

    Args:
        weight: ``(out, in)``, whitened if errors are to be measured under a metric.

    Example:
        >>> weight = torch.kron(torch.randn(2, 3), torch.randn(3, 2))
        >>> Spectra(weight).error(1, (2, 3), (3, 2)) < 1e-6
        True
    """

    def __init__(self, weight: Tensor) -> None:
        """Store the matrix in float64."""
        self.weight = weight.detach().double()
        self._screened = _in_range(self.weight).float()
        self._grams: dict[bool, Tensor] = {}
        self._tails: dict[tuple[Sequence[int], Sequence[int]], Tensor] = {}

    def error(self, terms: int, out_split: Sequence[int], in_split: Sequence[int]) -> float:
        """Return the relative error of the nearest sum of ``terms`` Kronecker products."""
        key = out_split, in_split
        if key not in self._tails:
            self._tails[key] = tails(self._energy(out_split, in_split))
        tail = self._tails[key]
        error: float = (float(tail[terms]) / (float(tail[0]) or 1.0)) ** 0.5
        return error

    def floor(self, terms: int, out_split: Sequence[int], in_split: Sequence[int]) -> float:
        """Return what the squared relative error of a thin split is at least, without a spectrum.

        t eigenvalues of a Gram matrix sum to no more than the root of t times its Frobenius norm.
        Of splits without such a Gram matrix nothing is known: 0.
        """
        gram = self._thin_gram(out_split, in_split)
        total = 0.0 if gram is None else float(gram.trace())
        if gram is None or total <= 0.0:
            return 0.0
        kept: float = terms**0.5 * float(torch.linalg.norm(gram)) / total
        return max(1.0 - kept, 0.0)

    def estimate(self, terms: int, out_split: Split, in_split: Split) -> float:
        """Estimate the squared relative error from evenly spaced blocks of the matrix."""
        return _estimate(self._screened, terms, out_split, in_split)

    def _energy(self, out_split: Sequence[int], in_split: Sequence[int]) -> Tensor:
        """Return the squared singular values of R(W), largest first."""
        gram = self._thin_gram(out_split, in_split)
        if gram is not None:
            return energies(gram)
        return spectrum(rearrange(self.weight, out_split, in_split))

    def _thin_gram(self, out_split: Sequence[int], in_split: Sequence[int]) -> Tensor | None:
        """Return the Gram matrix of the shorter side of R(W), if it is a partial trace."""
        (a, b), (c, d) = out_split, in_split
        short = min(a * c, b * d)
        for split, beside, is_rows in ((out_split, in_split, True), (in_split, out_split, False)):
            for kept in (0, 1):
                # The kept mode alone stands on one side of R(W).
                alone = beside[kept] == 1 and split[kept] == short
                if alone and split[0] * split[1] <= SHARED:
                    return self._traced(split, kept, is_rows)
        return None

    def _traced(self, split: Sequence[int], kept: int, is_rows: bool) -> Tensor:
        """Return the Gram matrix over one mode of the rows or columns, summed over the other."""
        if is_rows not in self._grams:
            rows = self.weight if is_rows else self.weight.T
            self._grams[is_rows] = rows @ rows.T
        gram = self._grams[is_rows].reshape(*split, *split)
        return gram.diagonal(dim1=1 - kept, dim2=3 - kept).sum(-1)


def is_thin(out_split: Sequence[int], in_split: Sequence[int]) -> bool:
    """Return whether one factor of the split is a vector, whose spectra are cheap.

    A product with a vector takes as many multiply-adds as the other factor has entries.
    """
    (a, b), (c, d) = out_split, in_split
    return 1 in (a, b, c, d) and any(1 in pair for pair in ((a, c), (b, d)))


def is_low_rank(out_split: Sequence[int], in_split: Sequence[int]) -> bool:
    """Return whether the terms are outer products of a column and a row.

    Example:
        >>> is_low_rank((6, 1), (1, 4)), is_low_rank((1, 6), (4, 1)), is_low_rank((6, 1), (2, 2))
        (True, True, False)
    """
    (a, b), (c, d) = out_split, in_split
    return (b == 1 and c == 1) or (a == 1 and d == 1)


def _estimate(weight: Tensor, terms: int, out_split: Split, in_split: Split) -> float:
    (a, b), (c, d) = out_split, in_split
    short = min(a * c, b * d)
    rows = sample(weight, out_split, in_split, max(4 * terms, SCREEN_ENTRIES // short))
    if rows.shape[0] > rows.shape[1]:
        rows = rows.T
    total = float(rows.square().sum())
    width = terms + 8
    if 4 * width < rows.shape[0]:
        # One power iteration finds the leading subspace, cheaper than all eigenvalues.
        start = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(0))
        basis = torch.linalg.qr(rows @ start.to(rows))[0]
        basis = torch.linalg.qr(rows @ (rows.T @ basis))[0]
        rows = basis.T @ rows
    kept = float(energies(rows @ rows.T)[:terms].sum())
    return 1.0 - kept / total if total > 0 else 0.0


def _in_range(weight: Tensor) -> Tensor:
    """Scale a matrix whose squares would overflow or underflow float32; return others unchanged."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    outside = largest > LARGE or 0.0 < largest < 1.0 / LARGE
    return weight / largest if outside else weight
