"""Rows with named columns, of text and of classes: read from files, and checked one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnlm.calibration.files import read_lines
from tnlm.errors import CalibrationError

Rows = Sequence[Mapping[str, Any]]


def read_rows(path: str | Path) -> Rows:
    """Read a ``.jsonl`` file, one object a line; empty lines are skipped.

    Raises:
        CalibrationError: for a file that cannot be read; names the line that is no JSON object.

    Example:
        >>> read_rows("no such file.jsonl")
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: no such file.jsonl: no such file; ...
    """
    return [row for _, row in read_lines(path)]


def check_rows(rows: Sequence[Any]) -> Rows:
    """Return rows of which each is a mapping.

    Raises:
        CalibrationError: for one that is not.
    """
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise CalibrationError(f"row {index} is a {type(row).__name__}; give dicts only")
    return rows


def text_at(row: Mapping[str, Any], index: int, column: str) -> str:
    """Return the string in a column.

    Raises:
        CalibrationError: if there is none; names the row.
    """
    value = _at(row, index, column, "text")
    if not isinstance(value, str):
        raise CalibrationError(f"row {index}: {column!r} is a {type(value).__name__}, not a string")
    return value


def class_at(row: Mapping[str, Any], index: int, column: str) -> int:
    """Return the class in a column, a whole number from 0.

    Raises:
        CalibrationError: if there is none; names the row.
    """
    value = _at(row, index, column, "label")
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise CalibrationError(
            f"row {index}: {column}={value!r}, but classes are integers from 0 on"
        )
    return int(value)


def _at(row: Mapping[str, Any], index: int, column: str, argument: str) -> Any:
    if column not in row:
        raise CalibrationError(
            f"row {index} has no column {column!r}, only {', '.join(map(repr, row))}; "
            f"name the right one: {argument}="
        )
    return row[column]
