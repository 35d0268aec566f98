"""The parameters that a plan leaves unchanged, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT = "kept dense"
"""Kind of the targets that a plan leaves dense."""
LARGEST_OUTSIDE = 1 / 3
"""Fraction of the body that may lie outside the targets without a warning."""
SHOWN = 3
"""Names shown per kind; the others are counted."""


@dataclass(frozen=True)
class Left:
    """A group of tensors that are not replaced, with one kind, name and reason.

    Attributes:
        kind: such as ``"embedding"``, ``"experts"`` or ``"not chosen"``.
        name: name of the parameters, with ``*`` for the numbers of blocks and experts.
        reason: why they are left unchanged.
        count: number of tensors.
        params: number of parameters.
        in_body: whether they are in the model's blocks, and neither embeddings nor heads.
    """

    kind: str
    name: str
    reason: str
    count: int
    params: int
    in_body: bool


@dataclass(frozen=True)
class Coverage:
    """All parameters of two or more dimensions that a plan does not replace.

    Attributes:
        body: number of parameters of two or more dimensions in the model's blocks, without
            embeddings and heads; in the whole model if it has no blocks.
        left: the groups that are not replaced.
    """

    body: int
    left: tuple[Left, ...] = ()

    @property
    def outside(self) -> int:
        """Parameters of the body that are not targets; targets kept dense do not count."""
        return sum(each.params for each in self.left if each.in_body and each.kind != KEPT)

    @property
    def share(self) -> float:
        """Fraction of the body's parameters that are targets.

        Example:
            >>> Coverage(100, (Left("experts", "h.*.up", "3-D", 4, 60, True),)).share
            0.4
        """
        return 1 - self.outside / self.body if self.body else 1.0

    def part(self, each: Left) -> float | None:
        """Return a group's fraction of the body, or None if it lies outside."""
        return each.params / self.body if each.in_body else None

    @classmethod
    def read(cls, data: Mapping[str, Any] | None) -> Coverage | None:
        """Read a coverage from plain values; None for plans that have none.

        Raises:
            TypeError: or another error, if the values are not those of a coverage.
        """
        if data is None:
            return None
        given = dict(data)
        left = tuple(Left(**each) for each in given.pop("left"))
        found = cls(left=left, **given)
        words = [word for each in left for word in (each.kind, each.name, each.reason)]
        counts = [count for each in left for count in (each.count, each.params)]
        if any(type(word) is not str for word in words) or any(
            type(count) is not int for count in (found.body, *counts)
        ):
            raise TypeError("a coverage may hold only words and counts")
        return found

    def warning(self) -> str:
        """Return a warning if more than a third of the body is outside; else an empty text."""
        if not self.body or self.outside <= LARGEST_OUTSIDE * self.body:
            return ""
        groups = [each for each in self.left if each.in_body and each.kind != KEPT]
        parts = ", ".join(f"{kind} {params / self.body:.0%}" for kind, params in _by_kind(groups))
        return (
            f"{self.outside / self.body:.0%} of the parameters in the model's blocks are outside "
            f"the targets and stay unchanged: {parts}; the report lists them under coverage"
        )

    def table(self) -> list[str]:
        """Return one line per kind and reason, the largest first."""
        rows: dict[tuple[str, str], list[Left]] = {}
        for each in sorted(self.left, key=lambda each: -each.params):
            rows.setdefault((each.kind, each.reason), []).append(each)
        cells = [HEADINGS, *(_row(*key, found) for key, found in rows.items())]
        widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
        return lines if self.left else []

    def summary(self) -> str:
        """Return the totals as one line."""
        params = sum(each.params for each in self.left)
        count = sum(each.count for each in self.left)
        return (
            f"left:    params {params:,} in {count} tensors of two or more dimensions; "
            f"{self.share:.3f} of the body's are targets"
        )


HEADINGS = ("left", "tensors", "params", "names", "reason")


def _row(kind: str, reason: str, found: Sequence[Left]) -> tuple[str, ...]:
    names = ", ".join(each.name for each in found[:SHOWN])
    more = f", {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    count, params = sum(each.count for each in found), sum(each.params for each in found)
    return kind, f"{count}", f"{params:,}", names + more, reason


def _by_kind(groups: Iterable[Left]) -> list[tuple[str, int]]:
    """Return the number of parameters per kind, the largest first."""
    sums: dict[str, int] = {}
    for each in groups:
        sums[each.kind] = sums.get(each.kind, 0) + each.params
    return sorted(sums.items(), key=lambda item: -item[1])
