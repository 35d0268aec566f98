"""Training in the end of a compression: by adapters, from the dense model, or on the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from tnlm.calibration.data import Batch

LABEL = "labels"


def recover(
    model: PreTrainedModel,
    kind: str,
    data: Sequence[Batch],
    *,
    tokens: int,
    teacher: PreTrainedModel | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train what tnlm made of a model, and nothing else of it.

    Args:
        model: compressed.
        kind: ``"lora"``, ``"distill"`` or ``"finetune"``.
        data: training sequences.
        tokens: tokens it is trained on.
        teacher: the dense model, for ``"distill"``.
        tokenizer: for masked language models.
        seed: of the order of the data.
        progress: show a progress bar.

    Raises:
        OptionError: for ``"lora"`` if peft is not installed.
        TrainingError: if the loss stops being finite.
    """
    from tnlm.recovery.distillation import distill
    from tnlm.recovery.heal import heal
    from tnlm.recovery.training import finetune

    rows = [_row(batch) for batch in data]
    common: dict[str, Any] = {
        "tokens": tokens,
        "tokenizer": tokenizer,
        "max_length": max(len(row["input_ids"]) for row in rows),
        "label": LABEL,
        "seed": seed,
        "progress": progress,
    }
    if kind == "lora":
        heal(model, rows, **common)
        return
    # Data that is short is used again.
    again = max(1.0, tokens / sum(len(row["input_ids"]) for row in rows))
    common |= {"train": "factors", "epochs": again}
    if kind == "distill" and teacher is not None:
        distill(model, teacher, rows, **common)
    else:
        finetune(model, rows, **common)


def _row(batch: Batch) -> dict[str, Any]:
    """Return a batch of one sequence as a row, with its class if it has one."""
    row: dict[str, Any] = {"input_ids": batch["input_ids"][0][batch["attention_mask"][0].bool()]}
    return row | ({LABEL: int(batch["labels"][0])} if "labels" in batch else {})
