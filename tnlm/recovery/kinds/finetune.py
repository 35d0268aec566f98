"""finetune: trains all factors on the data itself."""

from transformers import PreTrainedModel

from tnlm.recovery.kinds.base import Practice, RecoveryKind


def _run(model: PreTrainedModel, practice: Practice) -> None:
    from tnlm.recovery.training import finetune

    finetune(model, train="factors", **practice.options)


RECOVERY = RecoveryKind("finetune", "all factors, on the data itself", _run)
