"""Fastfood: a random matrix that is applied in O(n log n) time."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tnlm.errors import OptionError
from tnlm.studies.analysis.projections import Projection

CHUNK = 64
"""Size of the Hadamard matrices to multiply by; larger ones are Kronecker products of these."""


def hadamard(x: Tensor) -> Tensor:
    """Return the unnormalized Walsh-Hadamard transform of the last axis: H(H(x)) = n x.

    Args:
        x: ``(..., n)``, where n is a power of 2.

    Raises:
        OptionError: if n is not a power of 2.

    Example:
        >>> hadamard(torch.tensor([1.0, 2.0, 3.0, 5.0])).tolist()
        [11.0, -3.0, -5.0, 1.0]
    """
    shape, size = x.shape, x.shape[-1]
    if size < 1 or size & (size - 1):
        raise OptionError(f"a Hadamard transform of size {size}; allowed: powers of 2")
    left = size
    while left > 1:  # H of size 64 x 64 x ... applies one H along every axis
        chunk = min(left, CHUNK)
        mixed = _table(chunk).to(x) @ x.reshape(*shape[:-1], chunk, size // chunk)
        x = mixed.transpose(-1, -2).reshape(shape)  # the next axis comes to the front
        left //= chunk
    return x


@functools.cache
def _table(size: int) -> Tensor:
    """Return the Hadamard matrix of a small size."""
    if size == 1:
        return torch.ones(1, 1)
    half = _table(size // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


class Fastfood(Projection):
    """The first rows and columns of H G Π H B, scaled so that columns have length 1 on average.

    B contains random signs, Π is a permutation, G contains normal entries and H is the Hadamard
    transform. All have size L, the smallest power of 2 that is at least ``size`` and ``dims``, so
    that no input is cut off where a tensor is small. The inner product of two columns is of the
    order of √(3 / size). Of the H on the right only the first columns meet an input; as H is a
    Kronecker product of smaller ones, they repeat a transform of about ``dims``.

    Source: Le et al. 2013, arXiv 1408.3060; used for this by Li et al. 2018, arXiv 1804.08838.

    Example:
        >>> matrix = Fastfood(size=64, dims=2, seed=0)
        >>> float(matrix(torch.tensor([1.0, 0.0]).double()).norm().round(decimals=6))
        1.0
    """

    def __init__(self, size: int, dims: int, seed: int) -> None:
        """Draw nothing yet; see `Projection` for the arguments."""
        super().__init__(size, dims, seed)
        self._drawn: tuple[Tensor, Tensor, Tensor, float] | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Return P x ``(size,)`` of x ``(dims,)``."""
        signs, order, normal, scale = self._parts(x.device)
        few = hadamard(F.pad(x * signs, (0, self._few - self.dims)))
        mixed = few.repeat(len(order) // self._few)
        return hadamard(mixed[order] * normal.to(x))[: self.size] * scale

    def transpose(self, y: Tensor) -> Tensor:
        """Return Pᵀ y ``(dims,)`` of y ``(size,)``."""
        signs, order, normal, scale = self._parts(y.device)
        mixed = hadamard(F.pad(y, (0, len(order) - self.size))) * normal.to(y)
        back = torch.empty_like(mixed)
        back[order] = mixed
        return hadamard(back.reshape(-1, self._few).sum(0))[: self.dims] * signs * scale

    @property
    def _few(self) -> int:
        """The smallest power of 2 that is at least ``dims``."""
        return 1 << (self.dims - 1).bit_length()

    def _parts(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return B, Π, G, and the scale of the columns.

        They are drawn once and kept, because drawing takes several times as long as the transforms:
        8 bytes for each of L entries, so at most 16 bytes per row where ``dims`` is smaller.
        """
        if self._drawn is None or self._drawn[0].device != device:
            generator = self.generator()
            length = 1 << (max(self.size, self.dims) - 1).bit_length()
            signs = torch.randint(0, 2, (length,), generator=generator)[: self.dims] * 2 - 1
            order = torch.randperm(length, generator=generator)
            order = order.to(torch.int32) if length < 2**31 else order
            normal = torch.randn(length, generator=generator)
            scale = 1 / math.sqrt(self.size * float(normal.double().square().sum()))
            self._drawn = signs.to(device, torch.int8), order.to(device), normal.to(device), scale
        return self._drawn
