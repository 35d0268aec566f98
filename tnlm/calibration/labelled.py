"""Texts with classes: read from rows, files or datasets, and tokenised one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnlm.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def labelled(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str = "text",
    label: str = "label",
    max_length: int = 512,
) -> list[dict[str, Any]]:
    """Tokenise texts one by one, and keep the class of each.

    The result serves as ``calibration`` or ``training`` data for a classifier.

    Args:
        data: rows, the path of a ``.jsonl`` file, or a ``datasets.Dataset``.
        tokenizer: adds its special tokens.
        text: the column of texts.
        label: the column of classes, whole numbers from 0.
        max_length: tokens of a text at most.

    Returns:
        Rows of ``input_ids`` and ``labels``.

    Raises:
        CalibrationError: for data without rows, a missing column or file, or a label that is no
            class; names the row.

    Example:
        >>> labelled([], None)
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: labelled data holds no rows
    """
    rows = list(_read(data) if isinstance(data, str | Path) else data)
    if not rows:
        raise CalibrationError("labelled data holds no rows")
    found = []
    for number, row in enumerate(rows):
        words, value = _fields(row, text, label, f"row {number}")
        ids = tokenizer(words, truncation=True, max_length=max_length)["input_ids"]
        found.append({"input_ids": ids, "labels": value})
    return found


def _read(path: str | Path) -> Iterable[Any]:
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: not a readable .jsonl file: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{path}:{number}: not valid JSON: {error}") from error


def _fields(row: Any, text: str, label: str, where: str) -> tuple[str, int]:
    if not isinstance(row, Mapping) or text not in row or label not in row:
        has = list(row) if isinstance(row, Mapping) else type(row).__name__
        raise CalibrationError(f"{where} has {has}; it needs the columns {text!r} and {label!r}")
    words, value = row[text], row[label]
    if not isinstance(words, str):
        raise CalibrationError(f"{where}: {text!r} is a {type(words).__name__}, not a string")
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CalibrationError(f"{where}: {label}={value!r}; allowed: whole numbers from 0")
    return words, value
