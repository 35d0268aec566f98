"""Reads rows with columns of texts and classes from files, and checks them one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tnlm.calibration.files import read_lines
from tnlm.errors import CalibrationError

Rows = Sequence[Mapping[str, Any]]


def read_rows(path: str | Path) -> Rows:
    """Read a ``.jsonl`` file with one object per line; empty lines are skipped.

    Raises:
        CalibrationError: if the file cannot be read, or a line is not a JSON object; names the
            line.

    Example:
        >>> read_rows("no such file.jsonl")
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: no such file.jsonl: no such file; ...
    """
    return [row for _, row in read_lines(path)]


def check_rows(rows: Sequence[Any]) -> Rows:
    """Return the rows, each of which must be a mapping.

    Raises:
        CalibrationError: if a row is not a mapping.
    """
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise CalibrationError(f"row {index} is a {type(row).__name__}; give dicts only")
    return rows


def text_at(row: Mapping[str, Any], index: int, column: str) -> str:
    """Return the string in a column.

    Raises:
        CalibrationError: if there is no string; names the row.
    """
    value = _at(row, index, column, "text")
    if not isinstance(value, str):
        raise CalibrationError(f"row {index}: {column!r} is a {type(value).__name__}, not a string")
    return value


def class_at(row: Mapping[str, Any], index: int, column: str) -> int:
    """Return the class in a column, an integer from 0.

    Raises:
        CalibrationError: if there is no class; names the row.
    """
    value = _at(row, index, column, "label")
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise CalibrationError(f"row {index}: {column}={value!r}, but classes are integers from 0")
    return int(value)


def _at(row: Mapping[str, Any], index: int, column: str, argument: str) -> Any:
    if column not in row:
        raise CalibrationError(
            f"row {index} has no column {column!r}, only {', '.join(map(repr, row))}; "
            f"name the right one: {argument}="
        )
    return row[column]
