"""Training in the end of a compression: by adapters, from the dense model, or on the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from tnlm.calibration.data import Batch


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
    from tnlm.recovery.distill import distill
    from tnlm.recovery.heal import heal
    from tnlm.recovery.training import finetune

    common: dict[str, Any] = {
        "tokens": tokens,
        "tokenizer": tokenizer,
        "max_length": max(batch["input_ids"].shape[1] for batch in data),
        "seed": seed,
        "progress": progress,
    }
    if kind == "lora":
        heal(model, list(data), **common)
    elif kind == "distill" and teacher is not None:
        distill(model, teacher, list(data), train="factors", **common)
    else:
        finetune(model, list(data), train="factors", **common)
