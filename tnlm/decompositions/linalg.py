"""Truncated SVD and the row selection that gauge fixing rests on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tnlm.decompositions.subspace import gram, leading, pays
from tnlm.errors import ModelError, OptionError

EXACT_BELOW = 32
"""Up to this smaller side LAPACK's full SVD is as fast as the Gram matrix, and exact."""

METHODS = ("auto", "exact", "gram", "randomised")


class SVD(NamedTuple):
    """A truncated SVD and the squared Frobenius norm of what it leaves out."""

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
        method: ``"exact"`` (LAPACK), ``"gram"`` (eigenvectors of the smaller Gram matrix),
            ``"randomised"`` (a filtered random block, see `tnlm.decompositions.subspace`) or
            ``"auto"``, the fastest of these for the shape and rank. The Gram route's product
            ``u * s @ vh`` is an exact projection of ``matrix``, but singular values below 1e-8 of
            the largest, and the larger-side vectors that belong to them, are not accurate. The
            randomised route's product is a projection too; its error is at most 1.0001 times the
            least, else the Gram route takes over; triplets that hardly differ in their values are
            accurate as a group only.

    Raises:
        OptionError: for a rank outside 1..min(m, n), an unknown method, or a randomised one
            without a rank.

    Source: Eckart and Young, 1936.

    Example:
        >>> svd = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> [round(float(s), 6) for s in svd.s], round(svd.discarded, 6)
        ([3.0, 2.0], 1.0)
    """
    limit = min(matrix.shape)
    if rank is not None and not 1 <= rank <= limit:
        raise OptionError(f"rank={rank} for a {_by(matrix)} matrix; allowed: 1 to {limit}")
    if method not in METHODS or (method == "randomised" and rank is None):
        raise OptionError(
            f"method={method!r}; allowed: {', '.join(METHODS)}; randomised needs a rank"
        )
    matrix = matrix.detach().double()
    total = float(matrix.square().sum())
    found = None
    if method == "randomised" or (method == "auto" and rank and pays(matrix.shape, rank)):
        found = _randomised_svd(matrix, rank or limit)
    if found is None:
        full = method == "exact" or (method == "auto" and limit <= EXACT_BELOW)
        found = torch.linalg.svd(matrix, full_matrices=False) if full else _gram_svd(matrix, rank)
    u, s, vh = found
    if rank is None:
        rank = limit if tolerance is None else rank_for(s.square(), tolerance, total)
    u, s, vh = _fix_signs(u[:, :rank], s[:rank], vh[:rank])
    return SVD(u, s, vh, max(total - float(s.square().sum()), 0.0))


def nearest(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return an orthonormal left ``(m, rank)`` and the right ``left.T @ matrix``, float64.

    Their product has the least error of the rank, or at most 1.0001 times that where the
    randomised method pays; a float32 matrix is then multiplied in float32.

    Example:
        >>> left, right = nearest(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> (left @ right).diagonal().tolist()
        [3.0, 2.0, 0.0]
    """
    matrix = matrix.detach()
    if pays(matrix.shape, rank):
        found = leading(matrix if matrix.dtype == torch.float64 else matrix.float(), rank)
        if found is not None:
            return found.basis.double(), found.projected.double()
    matrix = matrix.double()
    if matrix.shape[0] <= matrix.shape[1]:
        left = torch.linalg.eigh(gram(matrix))[1].flip(-1)[:, :rank]
    else:
        inputs = torch.linalg.eigh(gram(matrix.T))[1].flip(-1)[:, :rank]
        left = torch.linalg.qr(matrix @ inputs)[0]
    return left, left.T @ matrix


def least_error(matrix: Tensor, rank: int) -> float:
    """Return the least relative error of a rank, or at most 1.0001 times that if it is quicker.

    Example:
        >>> round(least_error(torch.diag(torch.tensor([2.0, 2.0, 1.0])), 2), 6)
        0.333333
    """
    matrix = matrix.detach().double()
    total = float(matrix.square().sum())
    if total == 0.0:
        return 0.0
    found = leading(matrix, rank) if pays(matrix.shape, rank) else None
    left = total - float(found.energy.sum()) if found else float(tails(spectrum(matrix))[rank])
    return float((max(left, 0.0) / total) ** 0.5)


def _randomised_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    found = leading(matrix, rank)
    if found is None:
        return None
    s = found.projected.norm(dim=1)
    return found.basis, s, found.projected / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]


def _gram_svd(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    if matrix.shape[0] > matrix.shape[1]:
        u, s, vh = _gram_svd(matrix.T, rank)
        return vh.T, s, u.T
    u = torch.linalg.eigh(gram(matrix))[1].flip(-1)[:, :rank]
    scaled = u.T @ matrix
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


def energies(moment: Tensor) -> Tensor:
    """Return the eigenvalues of a Gram matrix, largest first, none negative."""
    values: Tensor = torch.linalg.eigvalsh(moment)
    return values.flip(0).clamp_min(0.0)


def spectrum(matrix: Tensor) -> Tensor:
    """Return the squared singular values, largest first, from the smaller Gram matrix."""
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return energies(gram(rows))


def rank_for(energy: Tensor, tolerance: float, total: float | None = None) -> int:
    """Return the smallest rank whose tail of ``energy`` is within a relative tolerance.

    Args:
        energy: squared singular values, largest first.
        tolerance: relative error, so that tail energy <= tolerance**2 * total.
        total: all the energy; the sum of ``energy`` when not given.

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

    LU with partial pivoting gives the start; rows are then swapped while any coefficient of
    ``basis @ inverse(basis[rows])`` exceeds ``bound``. Every swap multiplies the volume of the
    chosen block by more than ``bound``, so the loop ends.

    Args:
        basis: ``(m, r)`` with orthonormal columns, ``m >= r``.
        bound: largest coefficient allowed, above 1.

    Returns:
        ``r`` row numbers.

    Raises:
        ModelError: if the basis holds NaN or infinity, for which no choice would end.

    Source: Goreinov, Oseledets, Savostyanov, Tyrtyshnikov and Zamarashkin, "How to find a good
    submatrix", 2010 (maxvol).
    """
    if not bool(basis.isfinite().all()):
        raise ModelError("the factors are not finite: no rows can be chosen")
    rank = basis.shape[1]
    pivots = torch.linalg.lu_factor(basis)[1]
    permutation = list(range(len(basis)))
    for row, other in enumerate((pivots - 1).tolist()):
        permutation[row], permutation[other] = permutation[other], permutation[row]
    rows = torch.tensor(permutation[:rank], device=basis.device)
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
