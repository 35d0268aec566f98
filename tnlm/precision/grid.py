"""`Precision`: the grid of integers and scales on which a matrix is stored."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tnlm.errors import OptionError
from tnlm.utils.checks import is_whole

BITS = range(2, 9)
"""Bits of a code that can be stored."""
GROUP = 64
"""Columns that share a scale, unless said otherwise; int8 has one scale a row."""


@dataclass(frozen=True)
class Precision:
    """Codes of a few bits, times a scale for every group of a row's columns.

    Attributes:
        bits: of every code.
        group: columns that share a scale; the last group of a row may be shorter. None for one
            scale a row.
        symmetric: whether zero lies in the middle of the codes; else each group has its own zero.

    Example:
        >>> Precision(4).bytes(10, 128, itemsize=2), Precision(8, None).bytes(10, 128, itemsize=2)
        (680, 1300)
    """

    bits: int
    group: int | None = GROUP
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        if not is_whole(self.bits) or self.bits not in BITS:
            raise OptionError(
                f"bits={self.bits!r}; allowed: {BITS[0]} to {BITS[-1]}", argument="precision"
            )
        if self.group is not None and (not is_whole(self.group) or self.group < 8):
            raise OptionError(
                f"group={self.group!r}; allowed: 8 columns or more, or None for a whole row",
                argument="group",
            )

    @property
    def name(self) -> str:
        """The name that users write, such as ``"int4"``."""
        return f"int{self.bits}"

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 1 << self.bits

    def width(self, columns: int) -> int:
        """Return the columns of a group in a row of so many."""
        return columns if self.group is None else min(self.group, columns)

    def groups(self, columns: int) -> int:
        """Return how many groups a row has."""
        return -(-columns // max(self.width(columns), 1))

    def packed(self, columns: int) -> int:
        """Return the bytes that the codes of a row take: eight codes fill ``bits`` bytes."""
        return -(-columns // 8) * self.bits if self.bits < 8 else columns

    def bytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Return the bytes of a matrix's codes, scales and zeros.

        Args:
            rows: of the matrix.
            columns: of the matrix.
            itemsize: bytes of a scale, in the model's dtype.
        """
        zero = 0 if self.symmetric else 1
        return rows * (self.packed(columns) + self.groups(columns) * (itemsize + zero))

    def saves(self, rows: int, columns: int, itemsize: int) -> bool:
        """Return whether codes and scales take less than the matrix does in the model's dtype."""
        return self.bytes(rows, columns, itemsize) < rows * columns * itemsize

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as checkpoints and plans hold them."""
        return asdict(self)


def precision_of(name: str, group: int | None = None) -> Precision:
    """Return the precision of a name.

    Args:
        name: ``"int2"`` to ``"int8"``.
        group: columns that share a scale; 64 by default, and a whole row for int8.

    Raises:
        OptionError: if the name or the group is not allowed.

    Example:
        >>> precision_of("int4")
        Precision(bits=4, group=64, symmetric=True)
    """
    found = re.fullmatch(r"int([2-8])", name) if isinstance(name, str) else None
    if found is None:
        raise OptionError(
            f"unknown precision {name!r}; allowed: int2 to int8", argument="precision"
        )
    bits = int(found[1])
    usual = None if bits == BITS[-1] else GROUP
    return Precision(bits, usual if group is None else group)


def least_bytes(shapes: Iterable[tuple[int, int]], grid: Precision, itemsize: int) -> int:
    """Return the bytes of matrices, each packed where that takes less.

    Example:
        >>> least_bytes([(10, 64), (10, 1)], Precision(4), itemsize=2)
        360
    """
    return sum(
        min(grid.bytes(rows, columns, itemsize), rows * columns * itemsize)
        for rows, columns in shapes
    )
