"""Truncated SVD, and the selection of pivot rows for gauge fixing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnlm.errors import ModelError, OptionError
from tnlm.tensors.eigen import leading_left

EXACT_BELOW = 32
"""Up to this size of the smaller side, LAPACK's full SVD is as fast as the Gram route, and exact.
"""


class SVD(NamedTuple):
    """A truncated SVD, with the squared Frobenius norm of the discarded part."""

    u: Tensor
    s: Tensor
    vh: Tensor
    discarded: float


def truncated_svd(
    matrix: Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    method: str = "auto",
) -> SVD:
    """Return the best low-rank approximation of a matrix in the Frobenius norm.

    Args:
        matrix: ``(m, n)``, any float dtype and device; computed in float64.
        rank: singular triplets to keep, at most ``min(m, n)``.
        tolerance: instead of ``rank``, the relative error allowed: the smallest rank whose
            discarded energy is at most ``(tolerance * norm) ** 2``.
        method: ``"exact"`` (LAPACK), ``"gram"`` (eigenvectors of the smaller Gram matrix) or
            ``"auto"``. The Gram route is faster, especially at small rank. Its product
            ``u * s @ vh`` is an exact projection of ``matrix``, with an error at most 1.00005
            times the minimum (see :func:`tnlm.tensors.eigen.leading_left`), but singular values
            below 1e-8 of the largest, and their vectors on the larger side, are inaccurate.

    Raises:
        OptionError: if the rank is outside 1..min(m, n), or the method is unknown.

    Source: Eckart and Young, 1936.

    Example:
        >>> svd = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> [round(float(s), 6) for s in svd.s], round(svd.discarded, 6)
        ([3.0, 2.0], 1.0)
    """
    limit = min(matrix.shape)
    if rank is not None and not 1 <= rank <= limit:
        raise OptionError(f"rank={rank} for a {_by(matrix)} matrix; allowed: 1 to {limit}")
    if method not in ("auto", "exact", "gram"):
        raise OptionError(f"method={method!r}; allowed: auto, exact, gram")
    matrix = matrix.detach().double()
    if method == "auto":
        method = "exact" if limit <= EXACT_BELOW else "gram"
    if method == "exact":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vh = _gram_svd(matrix, limit if rank is None else rank)
    total = float(matrix.square().sum())
    if rank is None:
        rank = limit if tolerance is None else rank_for(s.square(), tolerance, total)
    u, s, vh = _fix_signs(u[:, :rank], s[:rank], vh[:rank])
    return SVD(u, s, vh, max(total - float(s.square().sum()), 0.0))


def _gram_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _gram_svd(matrix.T, rank)
        return vh.T, s, u.T
    u, scaled = leading_left(matrix, rank)
    if rank < len(matrix):  # u is any basis of the subspace: rotate it to singular vectors
        turn = torch.linalg.eigh(scaled @ scaled.T)[1].flip(-1)
        u, scaled = u @ turn, turn.T @ scaled
    s = scaled.norm(dim=1)
    vh = scaled / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
    return u, s, vh


def _fix_signs(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make the largest entry of every column of ``u`` positive, so that results are repeatable."""
    if u.numel() == 0:
        return u, s, vh
    peak = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return u * sign, s, vh * sign.T


def energies(gram: Tensor) -> Tensor:
    """Return the eigenvalues of a Gram matrix, largest first, clamped at 0."""
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0.0)


def spectrum(matrix: Tensor) -> Tensor:
    """Return the squared singular values, largest first, from the smaller Gram matrix."""
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return energies(rows @ rows.T)


def rank_for(energy: Tensor, tolerance: float, total: float | None = None) -> int:
    """Return the smallest rank whose tail of ``energy`` is within a relative tolerance.

    Args:
        energy: squared singular values, largest first.
        tolerance: relative error: the tail is at most ``tolerance**2 * total``.
        total: total energy; by default, the sum of ``energy``.

    Example:
        >>> rank_for(torch.tensor([9.0, 4.0, 1.0]), tolerance=0.3)
        2
    """
    tail = tails(energy)
    allowed = tolerance**2 * (float(tail[0]) if total is None else total)
    within = (tail[1:] <= allowed).nonzero()
    return int(within[0]) + 1 if len(within) else len(energy)


def tails(energy: Tensor) -> Tensor:
    """Return ``tail[k] = energy[k:].sum()`` for k = 0..len(energy)."""
    tail = energy.double().flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def pivot_rows(basis: Tensor, bound: float = 2.0) -> Tensor:
    """Choose rows of a tall matrix that span all its rows with small coefficients.

    Start from LU with partial pivoting, then swap rows while any coefficient of
    ``basis @ inverse(basis[rows])`` exceeds ``bound``. Every swap multiplies the volume of the
    chosen block by more than ``bound``, so the loop terminates.

    Args:
        basis: ``(m, r)`` with orthonormal columns, ``m >= r``.
        bound: largest coefficient allowed, above 1.

    Returns:
        ``r`` row indices.

    Raises:
        ModelError: if the basis has NaN or infinity, for which the loop would not terminate.

    Source: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin, "How to find a good
    submatrix", 2010 (maxvol).
    """
    if not bool(basis.isfinite().all()):
        raise ModelError("the factors are not finite, so no pivot rows can be chosen")
    rank = basis.shape[1]
    pivots = torch.linalg.lu_factor(basis)[1]
    order = list(range(basis.shape[0]))
    for row, other in enumerate((pivots - 1).tolist()):
        order[row], order[other] = order[other], order[row]
    rows = torch.tensor(order[:rank], device=basis.device)
    coefficients = torch.linalg.solve(basis[rows], basis, left=False)
    while True:
        peak = int(coefficients.abs().argmax())
        new, old = divmod(peak, rank)
        if abs(float(coefficients[new, old])) <= bound:
            return rows
        change = coefficients[new].clone()
        change[old] -= 1.0
        coefficients -= torch.outer(coefficients[:, old] / coefficients[new, old], change)
        rows[old] = new


def _by(matrix: Tensor) -> str:
    return "x".join(str(size) for size in matrix.shape)
