"""lora: trains adapters and merges them into the factors."""

from transformers import PreTrainedModel

from tnlm.recovery.kinds.base import Practice, RecoveryKind


def _run(model: PreTrainedModel, practice: Practice) -> None:
    from tnlm.recovery.heal import heal

    options = practice.options
    del options["epochs"]  # heal repeats short data by itself
    heal(model, **options)


RECOVERY = RecoveryKind("lora", "adapters, merged into the factors", _run, adapts=True)
