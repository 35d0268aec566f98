"""distill: trains all factors to match the dense model."""

from transformers import PreTrainedModel

from tnlm.errors import OptionError
from tnlm.recovery.kinds.base import Practice, RecoveryKind


def _run(model: PreTrainedModel, practice: Practice) -> None:
    from tnlm.recovery.distillation import distill

    options = practice.options
    if practice.teacher is None:
        raise OptionError(
            "recover='distill' needs the dense model as a teacher", argument="recover"
        )
    rows = options.pop("data")
    distill(model, practice.teacher, rows, preset=practice.preset, train="factors", **options)


RECOVERY = RecoveryKind("distill", "all factors, from the dense model", _run, needs_teacher=True)
