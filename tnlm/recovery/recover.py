"""Training in the end of a compression, by a named recovery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnlm.calibration.data import Batch

LABEL = "labels"


def as_lessons(data: Sequence[Batch], tokens: int) -> dict[str, Any]:
    """Return sequences, and how they are read, as `tnlm.recovery.training.finetune` takes them.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.arange(4)[None], "attention_mask": torch.ones(1, 4)}
        >>> as_lessons([batch], tokens=6)["epochs"]  # data that is short is used again
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
    """Return a batch of one sequence as a row, with its class if it has one."""
    row: dict[str, Any] = {"input_ids": batch["input_ids"][0][batch["attention_mask"][0].bool()]}
    return row | ({LABEL: int(batch["labels"][0])} if "labels" in batch else {})
