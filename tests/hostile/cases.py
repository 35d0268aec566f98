"""The cases: every way to break a checkpoint, drawn several times on every base; seeded."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.hostile import entries, files, tensors
from tests.hostile.bases import BASES
from tests.hostile.draft import Draft

FAMILIES = {"entries": entries.FAMILY, "tensors": tensors.FAMILY, "files": files.FAMILY}


class Case(NamedTuple):
    """One broken checkpoint.

    Attributes:
        base: from which it is made.
        name: of what is done to it.
        draw: which of several times this is done.
        by_sum: whether it may leave values that only a sum could know to be wrong.
    """

    base: str
    name: str
    draw: int
    by_sum: bool

    @property
    def id(self) -> str:
        return f"{self.base}-{self.name}-{self.draw}"

    def make(self, root: Path, path: Path) -> None:
        """Write the broken checkpoint; the same bytes every time."""
        shutil.copytree(root / self.base, path)
        _breaker(self.name)(Draft(path, random.Random(self.id)))


def cases(times: int = 1) -> list[Case]:
    """Return every case, in a fixed order; each way to break is drawn some times as often."""
    return [
        Case(base, f"{family}.{breaker.__name__}", draw, by_sum)
        for base in BASES
        for family, breakers in FAMILIES.items()
        for breaker, draws, by_sum in breakers
        for draw in range(times * draws)
    ]


def sample(count: int, bases: set[str]) -> list[Case]:
    """Return some cases on some bases, spread over all ways to break."""
    found = [case for case in cases() if case.base in bases]
    random.Random(0).shuffle(found)
    return found[:count]


def _breaker(name: str) -> Callable[[Draft], None]:
    family, _, function = name.partition(".")
    return next(b for b, _, _ in FAMILIES[family] if b.__name__ == function)
