"""Second moments, means and magnitudes of inputs."""

from tnlm.calibration.statistics import collect
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module


def _gather(task: Task) -> Found:
    return by_module(
        collect(
            task.model,
            task.modules,
            task.batches,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
            workers=task.workers,
        )
    )


GATHERER = Gatherer("inputs", ("moment", "mean", "magnitude"), _gather)
