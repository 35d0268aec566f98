"""Ranks that meet a budget at the least damage, as measured for each matrix by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tnlm.errors import BudgetError


@dataclass(frozen=True)
class Choice:
    """One rank of a matrix.

    Attributes:
        rank: the rank.
        saved: how many numbers fewer the model has.
        damage: how much more than the dense model's.
    """

    rank: int
    saved: int
    damage: float


def choose(choices: Mapping[str, list[Choice]], wanted: int) -> dict[str, Choice]:
    """Take, again and again, the step of least damage for each number saved, until enough are.

    A step makes one matrix smaller than it was. Damages are added up, though together they may be
    more or less than their sum.

    Args:
        choices: of each matrix, by name.
        wanted: numbers to save.

    Raises:
        BudgetError: if all of them together do not save so many.

    Example:
        >>> a, b = [Choice(2, 10, 0.1), Choice(1, 12, 0.9)], [Choice(4, 10, 0.3)]
        >>> {name: choice.rank for name, choice in choose({"a": a, "b": b}, 15).items()}
        {'a': 2, 'b': 4}
    """
    most = sum(max((c.saved for c in some), default=0) for some in choices.values())
    if most < wanted:
        raise BudgetError(
            f"the budget takes {wanted:,} numbers fewer; the smallest candidates of all matrices "
            f"save {most:,}: add targets, smaller candidates=, or keep more"
        )
    chosen: dict[str, Choice] = {}
    dense = Choice(0, 0, 0.0)
    while sum(choice.saved for choice in chosen.values()) < wanted:
        steps = [
            ((choice.damage - now.damage) / (choice.saved - now.saved), name, choice)
            for name, some in choices.items()
            for now in [chosen.get(name, dense)]
            for choice in some
            if choice.saved > now.saved
        ]
        _, name, choice = min(steps, key=lambda step: step[0])
        chosen[name] = choice
    return chosen
