"""Movement scores from pruning a copy of the model, whose weights are then fitted."""

from torch import Tensor

from tnlm.compression.gatherers.base import Found, Gatherer, Task
from tnlm.recovery.pruning.column_weights import column_weights
from tnlm.recovery.recover import as_lessons
from tnlm.targets.base import Member


def _gather(task: Task) -> Found:
    # Imported here because the trainer takes longer to import than all the rest.
    from tnlm.recovery.pruning.movement import movement_prune

    lessons = as_lessons(task.lessons, task.tokens)
    pruned = movement_prune(
        task.model,
        lessons.pop("data"),
        task.targets,
        tokenizer=task.data.tokenizer,
        seed=task.data.cut.seed,
        progress=task.progress,
        **lessons,
    )
    weights = {
        name: column_weights(scores, pruned.masks[name]) for name, scores in pruned.scores.items()
    }

    def read(target: Member, name: str) -> Tensor:
        return weights[target.name]

    return Found(read, model=pruned.model)


GATHERER = Gatherer("movement", ("movement",), _gather, first=True)
