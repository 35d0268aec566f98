"""The increase of the loss when experts of a mixture are dropped."""

from tnlm.calibration.removal import collect_removal
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module
from tnlm.metrics.measure import GRADIENTS
from tnlm.targets.dropping import mixtures_among


def _gather(task: Task) -> Found:
    targets = {target.module: target for target in task.targets}
    read = task.earlier[GRADIENTS].read
    return by_module(
        collect_removal(
            task.model,
            mixtures_among(task.targets),
            task.batches,
            lambda path: read(targets[path], "gradient"),
            progress=task.progress,
        )
    )


GATHERER = Gatherer("removal", ("removal",), _gather)
