"""Second moments, means and magnitudes of inputs."""

from tnlm.calibration.statistics import collect
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module


def _gather(task: Task) -> Found:
    cache = task.data.cache_dir
    return by_module(
        collect(task.model, task.modules, task.batches, cache_dir=cache, progress=task.progress)
    )


GATHERER = Gatherer("inputs", ("moment", "mean", "magnitude"), _gather)
