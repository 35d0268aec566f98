"""Leading eigenvectors of a symmetric matrix, without computing the others."""

from __future__ import annotations

import math

import scipy.linalg
import torch
from torch import Tensor

from tnlm.errors import ModelError, OptionError

LARGE = 512
"""Below this size, computing all eigenvectors takes no more time."""
MOST = 0.6
"""Above this fraction of the eigenvectors, computing all takes no more time."""
LOSS = 1e-4
"""Relative excess of discarded energy that single precision may cause."""
_ROUNDING = 10 * float(torch.finfo(torch.float32).eps)


def leading_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of a symmetric matrix and their eigenvectors, in float64.

    LAPACK computes a part of the spectrum in less time than all of it. If the matrix is small or
    not on the CPU, or most of the spectrum is needed, all of it is computed.

    Args:
        gram: ``(n, n)``, symmetric, float64.
        rank: number of eigenvalues, 1 to n.

    Returns:
        ``(rank,)``, largest first, and ``(n, rank)`` with orthonormal columns.

    Raises:
        OptionError: if the rank is outside 1..n.
        ModelError: if the matrix is not finite.

    Example:
        >>> values, vectors = leading_eigenpairs(torch.diag(torch.tensor([1.0, 3.0]).double()), 1)
        >>> values.tolist(), vectors.abs().tolist()
        ([3.0], [[0.0], [1.0]])
    """
    _check(gram, rank)
    if not _is_partial(gram, rank):
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    return _lapack(gram, rank)


def leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Return an orthonormal basis ``(n, rank)``, float64, of the leading eigenvectors.

    Large matrices are solved in single precision if the discarded energy is then at most
    ``1 + LOSS`` times the minimum; an error, its square root, grows by half of that. Because the
    solver is backward stable, it finds the eigenvectors of a matrix that differs by at most
    ``10 eps |gram|_F``, and the energy in a subspace of rank r differs by at most ``sqrt(2 r)``
    times that. If this bound is too large, as when a few directions dominate, double precision is
    used.

    Args:
        gram: ``(n, n)``, symmetric, positive semi-definite, float64.
        rank: number of eigenvectors, 1 to n.

    Raises:
        OptionError: if the rank is outside 1..n.
        ModelError: if the matrix is not finite.

    Example:
        >>> leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0]).double()), 1).abs().tolist()
        [[0.0], [1.0]]
    """
    _check(gram, rank)
    if _is_partial(gram, rank):
        energy = float(gram.trace())
        scale = energy / len(gram) or 1.0  # into the range of single precision
        values, vectors = _lapack((gram / scale).float(), rank)
        tail = energy - scale * float(values.double().sum())
        doubt = math.sqrt(2 * rank) * _ROUNDING * float(gram.norm())
        if doubt <= LOSS * tail:
            return _orthonormal(vectors.double())
    return leading_eigenpairs(gram, rank)[1]


def leading_left(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return leading left singular vectors U of a wide matrix, and ``U.T @ matrix``, in float64.

    The discarded energy is at most ``1 + LOSS`` times the minimum, as in
    :func:`leading_eigenvectors`. Here the Gram matrix is in single precision too. Its effect on the
    energy in the subspace found is measured in double precision, and the same effect is assumed for
    the best subspace.

    Args:
        matrix: ``(m, n)``, float64; cheapest if m is at most n.
        rank: number of singular vectors, 1 to m.

    Returns:
        ``(m, rank)`` with orthonormal columns, and ``(rank, n)``.

    Raises:
        OptionError: if the rank is outside 1..m.
        ModelError: if the matrix is not finite.

    Example:
        >>> basis, rest = leading_left(torch.tensor([[3.0, 4.0], [0.0, 0.0]]).double(), 1)
        >>> (basis @ rest).tolist()
        [[3.0, 4.0], [0.0, 0.0]]
    """
    size = float(matrix.norm())
    if math.isfinite(size) and size > 0 and _is_partial(matrix, rank):
        single = (matrix * (math.sqrt(len(matrix)) / size)).float()
        gram = single @ single.T
        values, vectors = _lapack(gram, rank)
        basis = _orthonormal(vectors.double())
        rest = basis.T @ matrix
        energy = len(matrix) * float(rest.norm() / size) ** 2
        tail = len(matrix) - energy
        doubt = math.sqrt(2 * rank) * _ROUNDING * float(gram.norm())
        if doubt + abs(float(values.double().sum()) - energy) <= LOSS * tail:
            return basis, rest
    basis = leading_eigenpairs(matrix @ matrix.T, rank)[1]
    return basis, basis.T @ matrix


def _check(gram: Tensor, rank: int) -> None:
    if not 1 <= rank <= len(gram):
        raise OptionError(
            f"rank={rank} of a {len(gram)}x{len(gram)} matrix; allowed: 1 to {len(gram)}"
        )
    if not bool(gram.isfinite().all()):
        raise ModelError("a matrix to decompose is not finite")


def _is_partial(matrix: Tensor, rank: int) -> bool:
    size = len(matrix)
    return matrix.device.type == "cpu" and size >= LARGE and 1 <= rank <= MOST * size


def _lapack(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    size = len(gram)
    values, vectors = scipy.linalg.eigh(
        gram.numpy(), subset_by_index=[size - rank, size - 1], driver="evr", check_finite=False
    )
    if len(values) < rank:  # LAPACK may miss some if many are equal
        whole, basis = torch.linalg.eigh(gram)
        return whole.flip(0)[:rank], basis.flip(1)[:, :rank]
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def _orthonormal(basis: Tensor) -> Tensor:
    """Refine columns orthonormal in single precision to double precision (Cholesky QR)."""
    root = torch.linalg.cholesky(basis.T @ basis)
    found: Tensor = torch.linalg.solve_triangular(root.T, basis, upper=True, left=False)
    return found
