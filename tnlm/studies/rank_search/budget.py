"""Ranks that meet a budget with the smallest loss, when each matrix was measured alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tnlm.errors import BudgetError
from tnlm.utils.ties import least


@dataclass(frozen=True)
class Choice:
    """One candidate rank of a matrix.

    Attributes:
        rank: the rank.
        saved: how many parameters it saves.
        increase: how much higher the loss is than the dense model's.
    """

    rank: int
    saved: int
    increase: float


def choose(choices: Mapping[str, list[Choice]], wanted: int) -> dict[str, Choice]:
    """Return ranks that together save enough parameters, found greedily.

    Each step makes one matrix smaller: the one where the loss increases least per parameter saved.
    Increases are summed over matrices, although their true effect together may differ.

    Args:
        choices: the candidates of each matrix, by name.
        wanted: how many parameters to save.

    Raises:
        BudgetError: if all matrices together cannot save that many.

    Example:
        >>> a, b = [Choice(2, 10, 0.1), Choice(1, 12, 0.9)], [Choice(4, 10, 0.3)]
        >>> {name: choice.rank for name, choice in choose({"a": a, "b": b}, 15).items()}
        {'a': 2, 'b': 4}
    """
    most = sum(max((c.saved for c in some), default=0) for some in choices.values())
    if most < wanted:
        raise BudgetError(
            f"the budget requires saving {wanted:,} parameters, but the smallest candidates of all "
            f"matrices save {most:,}; add targets, use smaller candidates=, or keep more",
            argument="candidates",
        )
    chosen: dict[str, Choice] = {}
    dense = Choice(0, 0, 0.0)
    while sum(choice.saved for choice in chosen.values()) < wanted:
        steps = [
            ((choice.increase - now.increase) / (choice.saved - now.saved), name, choice)
            for name, some in choices.items()
            for now in [chosen.get(name, dense)]
            for choice in some
            if choice.saved > now.saved
        ]
        _, name, choice = steps[least([step[0] for step in steps])]
        chosen[name] = choice
    return chosen
