"""Leading singular vectors of a large matrix without decomposing it, to an error that is checked.

A random block is filtered by a Chebyshev polynomial of ``M = W @ W.T``, which is at most 1 on the
eigenvalues that are not wanted and grows fastest above them; then W is projected on it and the
small matrix decomposed (Rayleigh-Ritz). Sources: Zhou and Saad 2007 (the filter); Halko,
Martinsson and Tropp 2011, arXiv 0909.4061 (the random start, and the cut to the rank after it);
Lin, Saad and Yang 2016, arXiv 1308.5467 (the density of eigenvalues from Lanczos runs).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SLACK = 1e-4
"""What is returned has at most ``1 + SLACK`` times the least error of its rank. The check is an
estimate from random probes: it must be half as small."""

ROUNDING, NEAR = 1e-14, 1e-3
"""Shares of the squared norm that count as nothing, and that are too near to float32's rounding."""

DEGREE, ROUNDS = 6, 4
"""Degree of a filter, and how many are tried before the method gives up."""

FLAT = 16.0
"""Up to this ratio of the largest eigenvalue to the cut the filter's square part is a matrix."""

PROBES, RUNS, STEPS = 16, 8, 12
"""Random vectors of the check; Lanczos runs and their length."""

PANEL = 512
"""Rows of a Gram matrix that are computed together."""


def pays(shape: Sequence[int], rank: int) -> bool:
    """Tell whether a few leading vectors cost less this way than all of the Gram matrix's.

    Example:
        >>> pays((4096, 4096), 1024), pays((576, 1536), 8), pays((576, 1536), 144)
        (True, True, False)
    """
    smaller = min(shape)
    return (smaller >= 2048 and 4 * rank <= smaller) or (smaller >= 512 and 16 * rank <= smaller)


class Leading(NamedTuple):
    """An orthonormal basis ``(m, rank)``, its products with the matrix, and their energies."""

    basis: Tensor
    projected: Tensor
    energy: Tensor


class _Ritz(NamedTuple):
    leading: Leading
    lowest: float
    excess: float
    left: float


def leading(matrix: Tensor, rank: int, *, seed: int = 0) -> Leading | None:
    """Return the leading left singular vectors of a matrix, or None if the error fails its check.

    ``basis @ projected`` is then the nearest matrix of the rank up to a factor ``1 + SLACK`` of
    the error. Products are in the dtype of the matrix, small solves in float64.

    Args:
        matrix: ``(m, n)``, float32 or float64.
        rank: vectors wanted, much fewer than m and n.
        seed: of the random start; with another one the result differs within the slack.

    Example:
        >>> matrix = torch.randn(60, 80, generator=torch.Generator().manual_seed(0)).double()
        >>> found = leading(matrix, 4)
        >>> error = (matrix - found.basis @ found.projected).norm()
        >>> bool(error <= (1 + SLACK) * torch.linalg.svdvals(matrix)[4:].norm())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + max(rank // 4, 32), *matrix.shape)
    total = float(matrix.square().sum(dtype=torch.float64))
    block = _start(matrix, width, generator)
    for _ in range(ROUNDS):
        found = _ritz(matrix, block, rank, total, generator)
        if matrix.dtype == torch.float32 and found.left < NEAR * total:
            matrix = matrix.double()
        elif found.excess <= SLACK * found.left + ROUNDING * total:
            return found.leading
        cut = max(found.lowest, torch.finfo(matrix.dtype).eps * float(found.leading.energy[0]))
        block = _filtered(matrix, block.to(matrix.dtype), cut)
    return None


def gram(rows: Tensor) -> Tensor:
    """Return ``rows @ rows.T``, at little more than half of the cost: the rest is its mirror image.

    Example:
        >>> rows = torch.arange(6.0).reshape(2, 3)
        >>> gram(rows).tolist()
        [[5.0, 14.0], [14.0, 50.0]]
    """
    size = len(rows)
    if size <= PANEL:
        return rows @ rows.T
    found = rows.new_empty(size, size)
    for start in range(0, size, PANEL):
        part = slice(start, start + PANEL)
        panel = rows[part] @ rows[: start + PANEL].T
        found[part, : panel.shape[1]] = panel
        found[:start, part] = panel[:, :start].T
    return found


def _start(matrix: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Return an orthonormal block: filtered where many vectors of a flat spectrum are wanted."""
    if 8 * width > len(matrix):
        rough = gram(matrix.float())
        largest, cut = _bounds(rough, width, generator)
        if 0 < largest <= FLAT * cut:
            return _filtered_at_once(rough, cut, width, generator).to(matrix.dtype)
    block = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    return _orthonormal(matrix @ (matrix.T @ _orthonormal(matrix @ block)))


def _filtered_at_once(rough: Tensor, cut: float, width: int, generator: torch.Generator) -> Tensor:
    """Return a random block under the filter ``T_6 = T_3(T_2)`` of a Gram matrix, orthonormal.

    ``T_2(M)`` is a matrix, so that two products make six degrees. The random block is sparse,
    which makes its first product cheap: each group of rows mixes into its own few columns.
    """
    twice = gram(_to_unit(rough, cut)).mul_(2.0)
    twice.diagonal().sub_(1.0)
    size = len(rough)
    groups = max(min(width // 16, size), 1)
    order = torch.randperm(size, generator=generator).to(rough.device)
    start, after = rough.new_zeros(width, size), rough.new_empty(width, size)
    columns = torch.arange(width, device=rough.device).tensor_split(groups)
    for rows, part in zip(order.tensor_split(groups), columns, strict=True):
        mixing = torch.randn(len(part), len(rows), generator=generator).to(rough)
        start[part[:, None], rows] = mixing
        after[part] = mixing @ twice[rows]
    previous, block = start.T, after.T
    for _ in range(DEGREE // 2 - 1):
        previous, block = block, torch.addmm(previous, twice, block, beta=-1.0, alpha=2.0)
    return _orthonormal(block)


def _to_unit(rough: Tensor, cut: float) -> Tensor:
    """Return a symmetric matrix whose eigenvalues in [0, cut] are moved to [-1, 1]."""
    moved = rough * (2.0 / cut)
    moved.diagonal().sub_(1.0)
    return moved


def _filtered(matrix: Tensor, block: Tensor, cut: float) -> Tensor:
    """Return a block under the Chebyshev filter of a degree, orthonormal.

    A step of the recurrence holds for any mixture of the columns, so that they are made
    orthonormal on the way: no direction outgrows the others beyond the precision.
    """
    previous, block = block, _moved(matrix, block, cut)
    for _ in range(DEGREE - 1):
        block, mixture = torch.linalg.qr(block)
        previous = torch.linalg.solve_triangular(mixture, previous, upper=True, left=False)
        previous, block = block, 2.0 * _moved(matrix, block, cut) - previous
    return _orthonormal(block)


def _moved(matrix: Tensor, block: Tensor, cut: float) -> Tensor:
    return (2.0 / cut) * (matrix @ (matrix.T @ block)) - block


def _bounds(rough: Tensor, width: int, generator: torch.Generator) -> tuple[float, float]:
    """Return the largest eigenvalue, and about the ``width``-th: where the count passes it.

    A Lanczos run from random vectors puts as many eigenvalues near each of its own as the share
    that the vectors have in it, times the size.
    """
    blocks = [_orthonormal(torch.randn(len(rough), RUNS, generator=generator).to(rough))]
    images = []
    while True:
        images.append(rough @ blocks[-1])
        if len(blocks) == STEPS or (len(blocks) + 1) * RUNS > len(rough):
            break
        basis, following = torch.cat(blocks, 1), images[-1]
        for _ in range(2):
            following = _orthonormal(following - basis @ (basis.T @ following))
        blocks.append(following)
    small = (torch.cat(blocks, 1).T @ torch.cat(images, 1)).double()
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    shares = vectors[:RUNS].square().sum(0) * (len(rough) / RUNS)
    # The values come in clusters, one of each run: a cluster is one point of the count.
    nodes, counts = values.reshape(-1, RUNS).mean(1), shares.reshape(-1, RUNS).sum(1)
    middles = (counts.cumsum(0) - counts / 2).tolist()
    points = list(zip([0.0, *middles], [float(values[0]), *nodes.tolist()], strict=True))
    for (few, high), (many, low) in pairwise(points):
        if width <= many:
            return float(values[0]), high + (low - high) * (width - few) / max(many - few, 1e-9)
    return float(values[0]), max(points[-1][1], 0.0)


def _ritz(
    matrix: Tensor, block: Tensor, rank: int, total: float, generator: torch.Generator
) -> _Ritz:
    """Return the best vectors in a block, and about how much of the energy they miss.

    The residual of a vector is R = M u - u e. An eigenvalue of M exceeds the e of its vector by
    about ``|R|^2 / (e - e')``, where e' bounds what the block leaves out (Mathias 1998): its
    lowest energy. |R| is estimated from random probes. Nor can more be missed than is left out.
    """
    products = block.T @ matrix
    energy, vectors = torch.linalg.eigh(gram(products).double())
    energy, vectors = energy.flip(0).clamp_min(0.0), vectors.flip(1)[:, :rank].to(matrix.dtype)
    basis, projected = block @ vectors, vectors.T @ products
    kept, lowest = energy[:rank], float(energy[-1])
    probes = torch.randn(len(matrix), PROBES, generator=generator).to(matrix)
    residual = (projected @ (matrix.T @ probes)).double()
    residual -= kept[:, None] * (basis.T @ probes).double()
    gaps = (kept - lowest).clamp_min(torch.finfo(torch.float64).tiny)
    excess = float((residual.square().mean(1) / gaps).sum())
    outside = max(total - float(energy.sum()), 0.0)
    left = max(total - float(kept.sum()), 0.0)
    return _Ritz(Leading(basis, projected, kept), lowest, min(excess, outside), left)


def _orthonormal(block: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(block)[0]
    return basis
