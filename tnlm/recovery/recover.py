"""Training in the end of a compression: by adapters, from the dense model, or on the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch

LABEL = "labels"
MIXED = ("mixed-rank", "mixed-rank-frozen")
"""Recoveries by layers that are dense now and then, with weights that are trained, or are not."""


def recover(
    model: PreTrainedModel,
    kind: str,
    data: Sequence[Batch],
    *,
    tokens: int,
    teacher: PreTrainedModel | None = None,
    dense: Mapping[str, Tensor] | None = None,
    preset: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train what tnlm made of a model, and nothing else of it.

    Args:
        model: compressed.
        kind: ``"lora"``, ``"distill"``, ``"finetune"``, or ``"mixed-rank"``, which trains the dense
            weights with the factors, or ``"mixed-rank-frozen"``, which trains the factors alone.
        data: training sequences.
        tokens: tokens it is trained on.
        teacher: the dense model, for ``"distill"``.
        dense: weights that were fitted, by the name of the layer, for the last two.
        preset: what ``"distill"`` compares, by default the predictions.
        tokenizer: for masked language models.
        seed: of the order of the data.
        progress: show a progress bar.

    Raises:
        OptionError: for ``"lora"`` if peft is not installed.
        TrainingError: if the loss stops being finite.
    """
    from tnlm.recovery.distillation import distill
    from tnlm.recovery.heal import heal
    from tnlm.recovery.mixed_rank import mixed_rank
    from tnlm.recovery.training import finetune

    lessons = as_lessons(data, tokens)
    rows = lessons.pop("data")
    common = lessons | {"tokenizer": tokenizer, "seed": seed, "progress": progress}
    if kind == "lora":
        del common["epochs"]  # data that is short is used again
        heal(model, rows, **common)
    elif kind in MIXED:
        mixed_rank(model, dense or {}, rows, train_dense=kind == MIXED[0], **common)
    elif kind == "distill" and teacher is not None:
        distill(model, teacher, rows, preset=preset, train="factors", **common)
    else:
        finetune(model, rows, train="factors", **common)


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
