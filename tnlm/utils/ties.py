"""Breaks ties between values that differ only by rounding: the first wins, on any machine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RELATIVE = 1e-9
"""Relative difference below which values count as equal."""

EXACT = 1e-8
"""Relative errors up to this size are rounding: square roots of cancelled squares."""


def least(values: Sequence[float], exact: float = 0.0) -> int:
    """Return the index of the smallest value, the first among equal ones.

    Args:
        values: at least one.
        exact: absolute difference up to which values also count as equal.

    Example:
        >>> least([0.5, 0.4 + 1e-16, 0.4]), least([1e-9, 1e-12]), least([1e-9, 1e-12], EXACT)
        (1, 1, 0)
    """
    lowest = min(values)
    bar = lowest + max(exact, RELATIVE * abs(lowest)) if math.isfinite(lowest) else lowest
    return next(index for index, value in enumerate(values) if value <= bar)


def significant(value: float) -> float:
    """Return a value rounded to ten digits, as a sort key.

    Example:
        >>> significant(0.1 + 0.2) == significant(0.3)
        True
    """
    return float(f"{value:.9e}")


def greatest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the largest values; equal ones in their order.

    Args:
        values: ``(n,)``; those that are not positive come last, in their order.
        count: how many indices to return.

    Example:
        >>> greatest(torch.tensor([1.0, 3.0, 3.0 + 1e-12, 2.0]).double(), 2).tolist()
        [1, 2]
    """
    values = values.double()
    steps = (values.clamp_min(torch.finfo(values.dtype).tiny).log() / RELATIVE).round()
    steps = steps.masked_fill(values <= 0, -1e15).masked_fill(values < 0, -2e15)
    return steps.sort(descending=True, stable=True).indices[:count]
