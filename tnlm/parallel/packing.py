"""Shares tasks out so that all processes take about the same time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def pack(costs: Sequence[float], groups: Sequence[Hashable], bins: int) -> list[int]:
    """Return the bin of every task: the costliest group first, each into the emptiest bin.

    Args:
        costs: predicted time of each task, in any unit.
        groups: tasks of one group go into one bin, for example because they share an input.
        bins: number of bins.

    Source: longest processing time first, Graham 1969, at most 4/3 of the best.

    Example:
        >>> pack([1, 5, 3, 3], ["a", "b", "c", "d"], 2)
        [0, 0, 1, 1]
    """
    sizes: dict[Hashable, float] = {}
    for cost, group in zip(costs, groups, strict=True):
        sizes[group] = sizes.get(group, 0.0) + cost
    loads, taken = [0.0] * bins, {}
    for group in sorted(sizes, key=lambda each: -sizes[each]):  # stable: the first of equals first
        emptiest = loads.index(min(loads))
        taken[group] = emptiest
        loads[emptiest] += sizes[group]
    return [taken[group] for group in groups]
