"""Mean gradients of the weights, under the data's own labels (ZS-SVD)."""

from tnlm.calibration.gradients import collect_gradients
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module


def _gather(task: Task) -> Found:
    return by_module(
        collect_gradients(
            task.model,
            task.modules,
            task.few,
            moment="none",
            slope=True,
            labels="data",
            seed=task.data.cut.seed,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
            workers=task.workers,
        )
    )


GATHERER = Gatherer("slopes", ("slope",), _gather)
