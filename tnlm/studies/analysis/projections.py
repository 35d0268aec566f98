"""Random matrices with few columns and many rows, which are never stored as matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**20
"""Entries of a dense matrix that are in memory at once."""


class Projection(ABC):
    """A fixed random matrix P ``(size, dims)`` whose columns have length 1, or nearly.

    It is never stored as a matrix. Random numbers are drawn on the CPU, so that a seed gives the
    same matrix on every device.

    Args:
        size: number of rows.
        dims: number of columns.
        seed: draws the matrix.
    """

    def __init__(self, size: int, dims: int, seed: int) -> None:
        """Remember the seed; see the class for the arguments."""
        self.size, self.dims, self.seed = size, dims, seed

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """Return P x ``(size,)`` of x ``(dims,)``."""

    @abstractmethod
    def transpose(self, y: Tensor) -> Tensor:
        """Return Pᵀ y ``(dims,)`` of y ``(size,)``."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return P x; its gradient is multiplied by Pᵀ."""
        result: Tensor = _Apply.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def generator(self) -> torch.Generator:
        """Return a new generator for the entries of the matrix."""
        return torch.Generator().manual_seed(self.seed)


class Dense(Projection):
    """Independent normal entries, with columns scaled to length 1.

    Blocks of rows are drawn whenever they are used, so that it takes time in proportion to
    size x dims and little memory.

    Source: Li et al. 2018, arXiv 1804.08838.

    Example:
        >>> matrix = Dense(size=50, dims=2, seed=0)
        >>> float(matrix(torch.tensor([1.0, 0.0]).double()).norm().round(decimals=6))
        1.0
    """

    def __init__(self, size: int, dims: int, seed: int) -> None:
        """Measure the columns; see :class:`Projection` for the arguments."""
        super().__init__(size, dims, seed)
        squares = torch.zeros(dims, dtype=torch.float64)
        for block in self._blocks():
            squares += block.double().square().sum(0)
        self._lengths = squares.sqrt()

    def apply(self, x: Tensor) -> Tensor:
        """Return P x ``(size,)`` of x ``(dims,)``."""
        scaled = x / self._lengths.to(x)
        return torch.cat([block.to(x) @ scaled for block in self._blocks()])

    def transpose(self, y: Tensor) -> Tensor:
        """Return Pᵀ y ``(dims,)`` of y ``(size,)``."""
        total, done = y.new_zeros(self.dims), 0
        for block in self._blocks():
            total += block.to(y).T @ y[done : done + len(block)]
            done += len(block)
        return total / self._lengths.to(y)

    def _blocks(self) -> Iterator[Tensor]:
        generator, rows = self.generator(), max(1, BLOCK // self.dims)
        for start in range(0, self.size, rows):
            yield torch.randn(min(rows, self.size - start), self.dims, generator=generator)


class _Apply(torch.autograd.Function):
    """Applies a projection, and keeps only the projection itself for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Projection) -> Tensor:
        ctx.projection = projection
        return projection.apply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.projection.transpose(gradients[0]), None
