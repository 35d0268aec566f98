"""What the experts of a mixture add: REAP's scores."""

from tnlm.calibration.routing import collect_routing
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module
from tnlm.targets.dropping import mixtures_among


def _gather(task: Task) -> Found:
    return by_module(
        collect_routing(
            task.model,
            mixtures_among(task.targets),
            task.batches,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
        )
    )


GATHERER = Gatherer("routing", ("reap", "routed"), _gather)
