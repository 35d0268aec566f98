"""Second moments of output gradients, under labels sampled from the model (K-FAC)."""

from tnlm.calibration.gradients import collect_gradients
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module


def _gather(task: Task, moment: str = "diagonal") -> Found:
    return by_module(
        collect_gradients(
            task.model,
            task.modules,
            task.few,
            moment=moment,
            labels="sampled",
            seed=task.data.cut.seed,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
            workers=task.workers,
        )
    )


GATHERER = Gatherer("gradients", ("gradient",), _gather)
