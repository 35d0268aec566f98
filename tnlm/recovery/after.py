"""Training in the end of a compression: by adapters, from the dense model, or on the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.recovery.tasks import LABEL, row_of, steps_for, training_batches


def recover(
    model: PreTrainedModel,
    kind: str,
    data: Sequence[Batch],
    *,
    tokens: int,
    teacher: PreTrainedModel | None = None,
    dense: Mapping[str, Tensor] | None = None,
    train: str = "factors",
    tokenizer: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train what tnlm made of a model, and nothing else of it.

    Args:
        model: compressed.
        kind: ``"lora"``, ``"distill"``, ``"finetune"`` or ``"mixed-rank"``.
        data: training sequences.
        tokens: tokens it is trained on.
        teacher: the dense model, for ``"distill"``.
        dense: weights that were fitted, by the name of the layer, for ``"mixed-rank"``.
        train: what ``"mixed-rank"`` trains.
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

    if kind == "mixed-rank":
        from tnlm.recovery.mixed_rank import mixed_rank_finetune

        batches = training_batches(model, data, tokenizer, seed=seed)
        steps = steps_for(batches, tokens)
        mixed_rank_finetune(
            model, dense or {}, batches, steps=steps, train=train, seed=seed, progress=progress
        )
        return
    rows = [row_of(batch) for batch in data]
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
