"""Symmetric matrices: sums of outer products, and storage of one half."""

from __future__ import annotations

import torch
from torch import Tensor

from tnlm.tensors.exact import power_of_two, rounded_products

COLUMNS = 256
"""Number of columns multiplied at once; the products above the diagonal blocks are not computed."""

WHOLE = torch.iinfo(torch.int16).max
"""The code of 1 in int16."""


def add_outer(total: Tensor, rows: Tensor) -> None:
    """Add the sum of the rows' outer products to the lower half of a matrix, in place.

    Products are in float32 unless that overflows or underflows, and sums in float64, rounded so
    that they are the same in any order of the calls (`tnlm.tensors.exact`). Above the diagonal, the
    matrix has no meaning afterwards.

    Args:
        total: ``(n, n)``, float64.
        rows: ``(count, n)``, float32.

    Example:
        >>> total = torch.zeros(2, 2).double()
        >>> add_outer(total, torch.tensor([[1e30, 2.0]]))
        >>> total.tril()
        tensor([[1.0000e+60, 0.0000e+00],
                [2.0000e+30, 4.0000e+00]], dtype=torch.float64)
    """
    norms = power_of_two(torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64))
    least, limits = torch.where(norms > 0, norms, torch.inf).min(), torch.finfo(torch.float32)
    if not float(norms.max()) ** 2 < limits.max or float(least) ** 2 < limits.tiny / limits.eps:
        rows = rows.double()
    for start in range(0, rows.shape[1], COLUMNS):
        end = start + COLUMNS
        part = rows[:, start:].T @ rows[:, start:end]
        total[start:, start:end] += rounded_products(part, norms[start:], norms[start:end])


def packed(matrix: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the lower half of a positive semi-definite matrix, and its diagonal.

    The half holds ``S[i, j] / sqrt(S[i, i] S[j, j])``, which is at most 1, as a rectangle: the last
    columns, turned, fill the corner that the first ones leave free. Rounding changes each value by
    at most u: ``2**-24`` for float32, ``1 / 65534`` for int16. So for any error E, the trace of
    ``E S E.T`` changes by at most ``n u`` times that of ``E D E.T``, with D the diagonal, which is
    exact.

    Args:
        matrix: S, ``(n, n)``, float64; only the lower half is read.
        dtype: float32 or int16.

    Returns:
        The half, ``(n + 1, n / 2)``, or for odd n ``(n, (n + 1) / 2)``; and the diagonal, ``(n,)``.

    Source: rectangular full packed format, Gustavson et al. 2010.

    Example:
        >>> half, diagonal = packed(torch.tensor([[4.0, 9.0], [3.0, 9.0]]).double())
        >>> half.tolist(), diagonal.tolist()
        ([[1.0], [1.0], [0.5]], [4.0, 9.0])
    """
    diagonal = matrix.diagonal().clone()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
    unit = matrix * scale
    unit *= scale[:, None]
    if dtype == torch.int16:
        unit = unit.clamp_(-1.0, 1.0).mul_(WHOLE).round_()
    size, half = len(unit), (len(unit) + 1) // 2
    odd = size % 2
    found = unit.new_zeros(size + 1 - odd, half, dtype=dtype)
    found[1 - odd :] = unit[:, :half].tril()
    found[: size - half, odd:] += unit[half:, half:].tril().T.to(dtype)
    return found, diagonal


def unpacked(half: Tensor, diagonal: Tensor) -> Tensor:
    """Return the symmetric matrix that was packed, in float64.

    Example:
        >>> unpacked(*packed(torch.tensor([[4.0, 9.0], [3.0, 9.0]]).double())).tolist()
        [[4.0, 3.0], [3.0, 9.0]]
    """
    size, columns = len(diagonal), half.shape[1]
    odd, scale = size % 2, diagonal.sqrt()
    found = diagonal.new_zeros(size, size)
    found[:, :columns] = half[1 - odd :].tril()
    found[columns:, columns:] = half[: size - columns, odd:].triu().T
    found *= scale
    found *= scale[:, None] / (1.0 if half.is_floating_point() else WHOLE)
    found += found.tril(-1).T
    found.diagonal().copy_(diagonal)
    return found
