"""Rows of plain values as CSV text."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Return rows that share their columns as CSV text with a header; empty without rows.

    Example:
        >>> as_csv([{"rank": 1, "loss": 2.5}])
        'rank,loss\n1,2.5\n'
    """
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
