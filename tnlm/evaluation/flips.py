"""Flips: items that a compressed model gets right and the dense one wrong, and vice versa."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RIGHT = 0.5
"""Items with at least this score count as right."""


@dataclass(frozen=True)
class Flips:
    """Indices of items, grouped by the change in their correctness.

    Attributes:
        learned: wrong before, right now.
        unlearned: right before, wrong now.
        right: right before and now.
        wrong: wrong before and now.

    Example:
        >>> print(Flips(learned=(4,), unlearned=(1, 2), right=(0,), wrong=()))
        learned 1, unlearned 2, right in both 1, wrong in both 0
    """

    learned: tuple[int, ...]
    unlearned: tuple[int, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"learned {len(self.learned)}, unlearned {len(self.unlearned)}, "
            f"right in both {len(self.right)}, wrong in both {len(self.wrong)}"
        )


def flips(dense: Sequence[float], compressed: Sequence[float]) -> Flips:
    """Compare two models' scores on the same items; scores of at least 0.5 count as right.

    Example:
        >>> flips([1.0, 0.0, 1.0], [1.0, 1.0, 0.0])
        Flips(learned=(1,), unlearned=(2,), right=(0,), wrong=())
    """
    pairs = [(a >= RIGHT, b >= RIGHT) for a, b in zip(dense, compressed, strict=True)]

    def where(before: bool, now: bool) -> tuple[int, ...]:
        return tuple(index for index, pair in enumerate(pairs) if pair == (before, now))

    return Flips(where(False, True), where(True, False), where(True, True), where(False, False))
