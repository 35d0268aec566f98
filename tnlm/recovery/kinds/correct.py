"""correct: trains adapters towards the dense model's predictions and merges them."""

from transformers import PreTrainedModel

from tnlm.errors import OptionError
from tnlm.recovery.kinds.base import Practice, RecoveryKind

LEARNING_RATE = 1e-3
BATCH = 1


def _run(model: PreTrainedModel, practice: Practice) -> None:
    from tnlm.recovery.heal import heal

    options = practice.options
    del options["epochs"]  # heal repeats short data by itself
    if practice.teacher is None:
        raise OptionError(
            "recover='correct' needs the dense model as a teacher", argument="recover"
        )
    options |= {"learning_rate": LEARNING_RATE, "batch_size": BATCH}
    heal(model, **options, teacher=practice.teacher)


RECOVERY = RecoveryKind(
    "correct",
    "adapters, from the dense model, merged",
    _run,
    needs_teacher=True,
    adapts=True,
    tokens=2**16,
)
