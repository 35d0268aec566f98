"""lora: adapters are trained and merged into the factors."""

from transformers import PreTrainedModel

from tnlm.recovery.kinds.base import Practice, RecoveryKind


def _run(model: PreTrainedModel, practice: Practice) -> None:
    from tnlm.recovery.heal import heal

    options = practice.options
    del options["epochs"]  # data that is short is used again
    heal(model, **options)


RECOVERY = RecoveryKind("lora", "adapters, merged into the factors", _run)
