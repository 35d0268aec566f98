"""How often tokens occur, and the inputs of heads that are tied to their embeddings."""

from tnlm.calibration.tokens import collect_tokens
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module
from tnlm.targets.table import heads_of


def _gather(task: Task) -> Found:
    return by_module(
        collect_tokens(
            task.model,
            heads_of(task.targets),
            task.batches,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
        )
    )


GATHERER = Gatherer("tokens", ("frequency", "moment"), _gather)
