"""One side of a metric: a positive semi-definite weighting of the rows or columns of an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tnlm.errors import CalibrationError

DAMPING = 1e-9
"""Keeps singular sides invertible, so that whitening by modes can be undone."""


class Side:
    """A symmetric positive semi-definite matrix S, full ``(n, n)`` or diagonal ``(n,)``, float64.

    Args:
        values: a second moment, or the diagonal of one.
        damping: fraction of S replaced by its mean diagonal, in [0, 1], so that directions absent
            from the data still count a little, and S may be singular. If all values are zero,
            every direction counts the same.

    Raises:
        CalibrationError: if the values are not finite.

    Example:
        >>> side = Side(torch.tensor([4.0, 1.0]), damping=0.0)
        >>> side.apply(torch.tensor([[3.0, 8.0]])).tolist()
        [[12.0, 8.0]]
    """

    def __init__(self, values: Tensor, damping: float = 0.0) -> None:
        """Damp the values; see the class for the arguments."""
        values = values.detach().to(torch.float64, copy=True)
        if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
            raise CalibrationError("a second moment is not finite")
        self.is_diagonal = values.dim() == 1
        diagonal = values if self.is_diagonal else values.diagonal()
        scale = float(diagonal.mean())
        if scale > 0:
            values.mul_(1.0 - damping)
            diagonal.add_(damping * scale)
        else:
            values.zero_()
            diagonal.fill_(1.0)
        self.values = values
        # Damping keeps the smallest eigenvalue above the rounding of the largest.
        self._definite = damping > len(values) ** 2 * torch.finfo(values.dtype).eps

    @property
    def mean(self) -> float:
        """The mean of the diagonal."""
        diagonal = self.values if self.is_diagonal else self.values.diagonal()
        return float(diagonal.mean())

    def apply(self, rows: Tensor) -> Tensor:
        """Return ``rows @ S``."""
        return rows * self.values if self.is_diagonal else rows @ self.values

    def part(self, kept: Tensor) -> Side:
        """Return the side of some rows or columns alone.

        Example:
            >>> Side(torch.tensor([4.0, 1.0, 3.0])).part(torch.tensor([0, 2])).values.tolist()
            [4.0, 3.0]
        """
        found = Side(among(self.values, kept))
        found._definite = self._definite
        return found

    def turned(self, rotation: Tensor) -> Side:
        """Return the side in a basis rotated by Q, ``Q.T S Q``.

        Example:
            >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
            >>> Side(torch.tensor([4.0, 1.0])).turned(swap.double()).values.diagonal().tolist()
            [1.0, 4.0]
        """
        found = Side(turned(self.values, rotation))
        found._definite = self._definite
        return found

    def times(self, scale: float) -> Side:
        """Return the side multiplied by a positive number.

        Example:
            >>> Side(torch.tensor([4.0, 1.0])).times(2.0).values.tolist()
            [8.0, 2.0]
        """
        found = Side(self.values * scale)
        found._definite = self._definite
        return found

    def inner(self, core: Tensor) -> float:
        """Return the trace of ``S @ core``."""
        if self.is_diagonal:
            return float(self.values @ core.diagonal())
        return float(torch.linalg.vecdot(self.values.flatten(), core.flatten()))

    def scale(self, rows: Tensor) -> Tensor:
        """Return ``rows @ R``, whose products with each other are those of ``rows`` under S."""
        return rows * self.root if self.is_diagonal else rows @ self.root

    def back(self, rows: Tensor) -> Tensor:
        """Return ``rows @ R.T``."""
        return rows * self.root if self.is_diagonal else rows @ self.root.T

    def unscale(self, rows: Tensor) -> Tensor:
        """Return ``rows @ R^-1``, without the directions that have no weight."""
        if self.is_diagonal:
            return rows * _inverse(self.root)
        if self._cholesky is not None:
            flat = rows.reshape(-1, rows.shape[-1])
            solved: Tensor = torch.linalg.solve_triangular(
                self._cholesky, flat, upper=False, left=False
            )
            return solved.reshape(rows.shape)
        values, vectors = self._eigen
        # Rounding turns zero eigenvalues of S into values of about 1e-16.
        seen = values > float(values.max()) * len(values) * torch.finfo(values.dtype).eps
        inverse = torch.where(seen, _inverse(values.sqrt()), 0.0)
        roots: Tensor = rows @ (vectors * inverse) @ vectors.T
        return roots

    @cached_property
    def root(self) -> Tensor:
        """R with ``R @ R.T = S``: the Cholesky factor if S is damped, or else the symmetric root.

        The roots of a diagonal are a diagonal.
        """
        if self.is_diagonal:
            return self.values.clamp_min(0.0).sqrt()
        if self._cholesky is not None:
            return self._cholesky
        values, vectors = self._eigen
        root: Tensor = (vectors * values.sqrt()) @ vectors.T
        return root

    @cached_property
    def _cholesky(self) -> Tensor | None:
        """The Cholesky factor of S, in a tenth of the time of eigenvectors, if S is definite."""
        if not self._definite:
            return None
        factor, failed = torch.linalg.cholesky_ex(self.values)
        return None if bool(failed) else factor

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.values)
        return values.clamp_min(0.0), vectors

    def modes(self, split: Sequence[int]) -> list[Side]:
        """Return one side for every mode of a split, so that their Kronecker product is close to S.

        Each is the mean of S over the other modes (a partial trace); the first also carries the
        scale. If S is a Kronecker product, the result is its factors.

        Example:
            >>> pair = torch.kron(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2))
            >>> [mode.values.diagonal().tolist() for mode in Side(pair).modes((2, 2))]
            [[1.0, 3.0], [1.0, 1.0]]
        """
        count = len(split)
        tensor = self.values.reshape(tuple(split) * (1 if self.is_diagonal else 2))
        found = []
        for mode, size in enumerate(split):
            rows = list(range(count))
            if self.is_diagonal:
                part = tensor.sum([k for k in rows if k != mode]) if count > 1 else tensor
            else:
                columns = [k if k != mode else count for k in rows]
                part = torch.einsum(tensor, rows + columns, [mode, count])
            part = part * (size / self.values.shape[0])
            found.append(Side(part if mode == 0 else part / self.mean))
        return found


def among(values: Tensor, kept: Tensor) -> Tensor:
    """Return the part of a full matrix, or of a diagonal, that belongs to some indices.

    Example:
        >>> among(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]))
        tensor([[4.]])
    """
    return values[kept] if values.dim() == 1 else values[kept][:, kept]


def turned(values: Tensor, rotation: Tensor) -> Tensor:
    """Return a symmetric matrix, or a diagonal, in a basis rotated by Q, ``Q.T S Q``.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> turned(torch.tensor([4.0, 1.0]), swap)
        tensor([[1., 0.],
                [0., 4.]])
    """
    half = rotation.T * values if values.dim() == 1 else rotation.T @ values
    whole = half @ rotation
    return (whole + whole.T) / 2.0


def modes_of(side: Side | None, split: Sequence[int]) -> list[Side | None]:
    """Return one invertible side for every mode of a split; None for each if there is no side.

    A mode that is the whole side gets the side itself, whose root may be cached.
    """
    if side is None:
        return [None] * len(split)
    if max(split) == math.prod(split):
        whole = list(split).index(max(split))
        return [side if mode == whole else None for mode in range(len(split))]
    return [Side(mode.values, DAMPING) for mode in side.modes(split)]


def _inverse(values: Tensor) -> Tensor:
    """Return 1 / values, and 0 where a value is negligible compared to the largest."""
    floor = float(values.max()) * 1e-12
    return torch.where(values > floor, 1.0 / values.clamp_min(floor or 1.0), 0.0)
