"""HOSVD and HOOI: orthonormal factors for some modes of a tensor, from small Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.decompositions import _tensorly
from tnlm.tensors.eigen import leading_eigenvectors

SWEEPS, STALL = 10, 1e-6
"""Most sweeps of HOOI, and the relative gain in core energy below which a sweep is the last."""


def hosvd(tensor: Tensor, ranks: Sequence[int], modes: Sequence[int]) -> list[Tensor]:
    """Return the leading left singular vectors ``(size, rank)`` of the unfolding of each mode.

    Args:
        tensor: float64.
        ranks: one for each of the modes.
        modes: axes of the tensor.

    Source: De Lathauwer, De Moor and Vandewalle, 2000.

    Example:
        >>> import torch
        >>> [factor.shape[1] for factor in hosvd(torch.randn(3, 4, 5).double(), [2, 3], [0, 2])]
        [2, 3]
    """
    return [_leading(tensor, mode, rank) for mode, rank in zip(modes, ranks, strict=True)]


@dataclass(frozen=True)
class Hosvd:
    """The full-rank HOSVD of a tensor, which contains the HOSVDs of all smaller ranks.

    Attributes:
        bases: orthogonal bases, one per mode, leading vectors first.
        core: the tensor in these bases.
        captured: energy of every leading block of the core.
    """

    bases: Sequence[Tensor]
    core: Tensor
    captured: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Hosvd:
        """Decompose a float64 tensor.

        Example:
            >>> tensor = torch.arange(24.0).double().reshape(2, 3, 4)
            >>> whole = Hosvd.of(tensor)
            >>> whole.error((2, 3, 4)) < 1e-7 < whole.error((1, 1, 1))
            True
        """
        modes = range(tensor.dim())
        bases = hosvd(tensor, tensor.shape, modes)
        core = _contracted(tensor, bases, modes, modes)
        captured = core.square()
        for mode in modes:
            captured = captured.cumsum(mode)
        return cls(bases, core, captured)

    def error(self, ranks: Sequence[int]) -> float:
        """Return the relative error at some ranks: at most sqrt(modes) times the minimum."""
        total = float(self.captured.flatten()[-1])
        kept = float(self.captured[tuple(rank - 1 for rank in ranks)])
        return max(1.0 - kept / total, 0.0) ** 0.5 if total else 0.0

    def truncated(self, ranks: Sequence[int]) -> Tensor:
        """Return the tensor truncated to some ranks."""
        found = self.core[tuple(slice(rank) for rank in ranks)]
        for mode, (basis, rank) in enumerate(zip(self.bases, ranks, strict=True)):
            found = torch.tensordot(basis[:, :rank], found, ([1], [mode])).movedim(0, mode)
        return found


def hooi(
    tensor: Tensor, factors: Sequence[Tensor], modes: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """Optimise each factor in turn, with the others fixed; the core's energy never decreases.

    Each half of the modes shares the tensor contracted with the other half.

    Args:
        tensor: float64.
        factors: orthonormal, one for each of the modes.
        modes: axes of the tensor, at least one.

    Returns:
        The factors and the core.

    Source: De Lathauwer, De Moor and Vandewalle, "On the best rank-1 and rank-(R1, R2, ..., RN)
    approximation of higher-order tensors", 2000.
    """
    found, numbers = list(factors), list(range(len(modes)))
    halves = [half for half in (numbers[: len(modes) // 2], numbers[len(modes) // 2 :]) if half]
    part, core, energy = tensor, None, 0.0
    for _ in range(SWEEPS):
        for half in halves:
            shared = _contracted(tensor, found, modes, [k for k in numbers if k not in half])
            for index in half:
                part = _contracted(shared, found, modes, [k for k in half if k != index])
                found[index] = _leading(part, modes[index], found[index].shape[1])
        core = _contracted(part, found, modes, [numbers[-1]])
        before, energy = energy, float(core.square().sum())
        if energy - before <= STALL * energy:
            break
    return found, _contracted(tensor, found, modes, numbers) if core is None else core


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Return the unfolding ``(size, all others)`` of a tensor along a mode."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def _contracted(
    tensor: Tensor, factors: Sequence[Tensor], modes: Sequence[int], chosen: Sequence[int]
) -> Tensor:
    if not chosen:
        return tensor
    matrices = [factors[k] for k in chosen]
    return _tensorly.multi_mode_dot(tensor, matrices, [modes[k] for k in chosen])


def _leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    unfolded = unfold(tensor, mode)
    return leading_eigenvectors(unfolded @ unfolded.T, rank)
