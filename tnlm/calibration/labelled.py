"""Reads texts with classes from rows, files or datasets, and tokenises them one by one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnlm.calibration.rows import check_rows, class_at, read_rows, text_at
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
    """Tokenise texts one by one, with their classes.

    The result can be passed as ``calibration`` or ``training`` data for a classifier.

    Args:
        data: rows, the path of a ``.jsonl`` file, or a ``datasets.Dataset``.
        tokenizer: the model's tokenizer, which adds its special tokens.
        text: name of the text column.
        label: name of the class column, with integers from 0.
        max_length: most tokens per text.

    Returns:
        Rows of ``input_ids`` and ``labels``.

    Raises:
        CalibrationError: if there are no rows, a column or file is missing, or a label is not a
            class; names the row.

    Example:
        >>> labelled([], None)
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: labelled data has no rows
    """
    rows = check_rows(list(read_rows(data) if isinstance(data, str | Path) else data))
    if not rows:
        raise CalibrationError("labelled data has no rows")
    classes = [class_at(row, index, label) for index, row in enumerate(rows)]
    texts = [text_at(row, index, text) for index, row in enumerate(rows)]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": i, "labels": c} for i, c in zip(ids, classes, strict=True)]
