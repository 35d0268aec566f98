"""Texts with classes: read from rows, files or datasets, and tokenised one by one."""

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
    rows = check_rows(list(read_rows(data) if isinstance(data, str | Path) else data))
    if not rows:
        raise CalibrationError("labelled data holds no rows")
    classes = [class_at(row, index, label) for index, row in enumerate(rows)]
    texts = [text_at(row, index, text) for index, row in enumerate(rows)]
    ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": i, "labels": c} for i, c in zip(ids, classes, strict=True)]
