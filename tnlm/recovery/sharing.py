"""Shares the batches of a training out to the processes of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tnlm.parallel.ranks import Ranks, are_given
from tnlm.parallel.workers import ALONE, Workers


def team() -> Workers:
    """Return the processes that train together: all that were started, as `finetune` takes.

    Example:
        >>> team().size
        1
    """
    return Ranks() if are_given() else ALONE


def in_steps(order: Sequence[int], workers: Workers) -> list[int | None]:
    """Return the batch of this process in every step; None where none is left for it.

    Args:
        order: batches in the order in which they are trained on, the same in all processes.
        workers: all processes; each takes one batch of a step.

    Example:
        >>> in_steps([3, 1, 2], ALONE)
        [3, 1, 2]
    """
    return list(workers.mine([*order, *[None] * (-len(order) % workers.size)]))


def average(parameters: Sequence[nn.Parameter], count: int, workers: Workers) -> bool:
    """Replace gradients by their mean over all processes, and return whether there is one.

    Args:
        parameters: the same in all processes.
        count: predictions that this process's loss is a mean over, by which it counts; 0 if it has
            no gradients.
        workers: all processes.
    """
    if workers.size == 1:
        return count > 0
    sums = [torch.tensor([float(count)], dtype=torch.float64, device=parameters[0].device)]
    for parameter in parameters:
        held = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        sums.append(held.detach().double().flatten() * count)
    total = torch.cat(sums)
    workers.add_up(total)
    if not float(total[0]):
        return False
    means = (total[1:] / total[0]).split([parameter.numel() for parameter in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter).to(parameter.dtype)
    return True
