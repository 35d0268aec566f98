"""Converts training data for the recovery after a compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnlm.calibration.data import Batch

LABEL = "labels"


def as_lessons(data: Sequence[Batch], tokens: int) -> dict[str, Any]:
    """Return sequences, with arguments for `tnlm.recovery.training.finetune` to read them.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.arange(4)[None], "attention_mask": torch.ones(1, 4)}
        >>> as_lessons([batch], tokens=6)["epochs"]  # short data is repeated
        1.5
    """
    rows = [_row(batch) for batch in data]
    lengths = [len(row["input_ids"]) for row in rows]
    return {
        "data": rows,
        "tokens": tokens,
        "epochs": max(1.0, tokens / sum(lengths)),
        "max_length": max(lengths),
        "label": LABEL,
    }


def _row(batch: Batch) -> dict[str, Any]:
    """Convert a batch of one sequence to a row, with its class if it has one."""
    row: dict[str, Any] = {"input_ids": batch["input_ids"][0][batch["attention_mask"][0].bool()]}
    return row | ({LABEL: int(batch["labels"][0])} if "labels" in batch else {})
