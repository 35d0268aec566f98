"""Distances of a student from its teacher; each is 0 where the two agree. Padding never counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-12


def logits(student: Tensor, teacher: Tensor, seen: Tensor, temperature: float) -> Tensor:
    """Return ``T**2 KL(teacher || student)`` of softened predictions, a mean over them.

    Args:
        student: ``(sequences, length, words)``, or ``(sequences, classes)``.
        teacher: likewise; of any dtype and device.
        seen: ``(sequences, length)``, False at padding.
        temperature: T; its square keeps the gradient's size.

    Example:
        >>> same = torch.randn(2, 3, 5)
        >>> float(logits(same, same, torch.ones(2, 3).bool(), 2.0))
        0.0
    """
    if student.dim() == 3:
        student, teacher = student[seen], teacher[seen.to(teacher.device)]
    wanted = (teacher.to(student.device).float() / temperature).log_softmax(-1)
    found = (student.float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def outputs(student: Sequence[Tensor], teacher: Sequence[Tensor], seen: Tensor) -> Tensor:
    """Return the squared error of vectors relative to the teacher's size, a mean over layers.

    Args:
        student: ``(sequences, length, width)`` for every layer.
        teacher: likewise.
        seen: ``(sequences, length)``, False at padding.

    Example:
        >>> two = [2 * torch.ones(1, 3, 4)]
        >>> float(outputs([torch.ones(1, 3, 4)], two, torch.ones(1, 3).bool()))
        0.25
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        found, wanted = ours[seen].float(), theirs.to(ours.device)[seen].float()
        size = wanted.square().mean().clamp_min(TINY)
        errors.append((found - wanted).square().mean() / size)
    return torch.stack(errors).mean()


def maps(student: Sequence[Tensor], teacher: Sequence[Tensor], seen: Tensor) -> Tensor:
    """Return ``KL(teacher || student)`` of attention maps, a mean over layers, heads and tokens.

    Args:
        student: probabilities ``(sequences, heads, length, length)`` for every layer.
        teacher: likewise.
        seen: ``(sequences, length)``, False at padding.

    Example:
        >>> even = [torch.full((1, 2, 3, 3), 1 / 3)]
        >>> float(maps(even, even, torch.ones(1, 3).bool()))
        0.0
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        found = ours.float().clamp_min(TINY).log()
        wanted = theirs.to(ours.device).float()
        logs = wanted.clamp_min(TINY).log()
        divergence = (wanted * (logs - found)).sum(-1)  # (sequences, heads, length)
        errors.append(divergence.transpose(1, 2)[seen].mean())
    return torch.stack(errors).mean()
