"""Lower convex hulls of choices, each with a price and a loss, and their best combinations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from tnlm.utils.ties import significant

Choice = TypeVar("Choice")
Point = Callable[[Choice], tuple[float, float]]
"""Returns the price and the loss of a choice."""


def lower_hull(choices: Sequence[Choice], point: Point[Choice]) -> list[Choice]:
    """Keep the choices that are optimal for some multiplier of the price.

    Args:
        choices: by increasing price and decreasing loss.
        point: returns the price and the loss of each.

    Example:
        >>> lower_hull([(1, 9), (2, 8), (3, 1), (4, 0)], lambda choice: choice)
        [(1, 9), (3, 1), (4, 0)]
    """
    hull: list[Choice] = []
    for choice in choices:
        while len(hull) > 1 and _slope(point, hull[-2], hull[-1]) >= _slope(
            point, hull[-1], choice
        ):
            hull.pop()
        hull.append(choice)
    return hull


def combinations(parts: Sequence[Sequence[Choice]], point: Point[Choice]) -> Iterator[list[Choice]]:
    """Yield the combinations of one choice of each part that are optimal for some multiplier.

    The first has the cheapest choices; then come the steps of the hulls in order of gain per price.

    Example:
        >>> parts = [[(1, 9), (3, 1)], [(1, 5), (2, 4)]]
        >>> list(combinations(parts, lambda choice: choice))
        [[(1, 9), (1, 5)], [(3, 1), (1, 5)], [(3, 1), (2, 4)]]
    """
    hulls = [lower_hull(part, point) for part in parts]
    steps = [
        (_slope(point, a, b), index, b)
        for index, hull in enumerate(hulls)
        for a, b in pairwise(hull)
    ]
    chosen = [hull[0] for hull in hulls]
    yield list(chosen)
    for _, index, better in sorted(steps, key=lambda step: significant(step[0])):
        chosen[index] = better
        yield list(chosen)


def _slope(point: Point[Choice], a: Choice, b: Choice) -> float:
    (before, worse), (after, better) = point(a), point(b)
    return (better - worse) / (after - before)
