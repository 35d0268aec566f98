"""Splits sizes into modes, and scales ranks to a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

STEPS = 256
"""Steps of the search for a common scale of several ranks."""


@cache
def balanced_split(size: int, parts: int) -> tuple[int, ...]:
    """Return ``parts`` whole numbers that multiply to ``size``, as equal as possible.

    Nothing is padded: a prime gives itself and ones, as the plan then shows.

    Example:
        >>> balanced_split(576, 2), balanced_split(576, 3), balanced_split(7, 2)
        ((24, 24), (8, 8, 9), (1, 7))
    """
    if parts == 1:
        return (size,)
    options = [
        tuple(sorted((first, *balanced_split(size // first, parts - 1))))
        for first in range(1, math.isqrt(size) + 1)
        if size % first == 0
    ]
    return min(options, key=lambda split: (max(split), -min(split)))


def largest_within(
    ranks_at: Callable[[float], tuple[int, ...]], fits: Callable[[tuple[int, ...]], bool]
) -> tuple[int, ...] | None:
    """Return the largest ranks that fit, on a scale from 0 to 1, or None if none fit.

    Args:
        ranks_at: returns the ranks for a scale in (0, 1]; they grow with it.
        fits: returns whether ranks are within the budget.
    """
    low, high = 0, STEPS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(ranks_at(middle / STEPS)) else (low, middle - 1)
    if low:
        return ranks_at(low / STEPS)
    least = ranks_at(1e-9)
    return least if fits(least) else None


def scaled(limits: tuple[int, ...], scale: float) -> tuple[int, ...]:
    """Return each limit times ``scale``, rounded up, at least 1.

    Example:
        >>> scaled((10, 4), 0.5)
        (5, 2)
    """
    return tuple(max(1, min(limit, math.ceil(scale * limit - 1e-9))) for limit in limits)


def orders(options: Mapping[str, Any], default: Sequence[int]) -> Sequence[int]:
    """Return the numbers of cores to try: if several ranks are given, one more than these.

    Example:
        >>> orders({"ranks": [4, 8]}, (2, 3, 4)), orders({"ranks": [4]}, (2, 3))
        ((3,), (2, 3))
    """
    ranks = options.get("ranks") or ()
    return (len(ranks) + 1,) if len(ranks) > 1 else default


def ranks_at(
    limits: tuple[int, ...], options: Mapping[str, Any]
) -> Callable[[float], tuple[int, ...]]:
    """Return a function from a scale to the ranks of a train, with a common cap on all bonds.

    If ``options["ranks"]`` is given, several ranks are used unchanged, and a single one is the cap.

    Example:
        >>> ranks_at((4, 8), {})(0.5), ranks_at((4, 8), {"ranks": [6]})(0.5)
        ((4, 4), (4, 6))
    """
    given = options.get("ranks")
    if given and len(given) > 1:
        return lambda _: tuple(given)

    def capped(scale: float) -> tuple[int, ...]:
        cap = given[0] if given else max(1, round(scale * max(limits)))
        return tuple(min(cap, limit) for limit in limits)

    return capped
