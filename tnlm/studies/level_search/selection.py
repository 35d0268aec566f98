"""How offspring of a search are selected, in stages on more and more tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tnlm.errors import OptionError
from tnlm.utils.checks import check_whole


@dataclass(frozen=True)
class Selection:
    """How offspring are selected: each stage measures the rest on more tokens, and keeps fewer.

    Attributes:
        offspring: mutated copies of the parent in a generation.
        survivors: how many are kept after each stage; the last is one.
        tokens: tokens that each stage measures.

    Example:
        >>> Selection().cost, PUBLISHED.cost
        (32768, 393216)
    """

    offspring: int = 16
    survivors: Sequence[int] = (4, 2, 1)
    tokens: Sequence[int] = (512, 2048, 8192)

    def check(self) -> None:
        """Raise `OptionError` unless the stages fit together."""
        check_whole("offspring", self.offspring)
        counts = (self.offspring, *self.survivors)
        falls = all(a >= b >= 1 for a, b in zip(counts, self.survivors, strict=False))
        if len(self.tokens) != len(self.survivors) or not falls or list(self.survivors[-1:]) != [1]:
            raise OptionError(
                f"survivors={self.survivors}, tokens={self.tokens}; allowed: one count for each "
                "number of tokens, none larger than the one before it, and 1 at the end",
                argument=("survivors", "tokens"),
            )
        for count in self.tokens:
            check_whole("tokens", count)

    @property
    def cost(self) -> int:
        """Tokens that one generation runs through a compressed model."""
        return sum(
            count * tokens
            for count, tokens in zip((self.offspring, *self.survivors), self.tokens, strict=False)
        )


def check_selection(selection: Any) -> None:
    """Raise `OptionError` unless it is a `Selection` whose stages fit together."""
    if not isinstance(selection, Selection):
        raise OptionError(
            f"selection={selection!r}; give a Selection of tnlm.studies.level_search",
            argument="selection",
        )
    selection.check()


DEFAULT = Selection()
"""What a search does unless asked for more."""

PUBLISHED = Selection(64, (8, 2, 1), (2048, 16384, 65536))
"""The selection of EvoPress (Sieberling et al. 2024, arXiv 2410.14649) for language models."""
