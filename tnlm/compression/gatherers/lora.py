"""Squared gradients of a LoRA."""

from tnlm.calibration.lora import lora_statistics
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module


def _gather(task: Task, kind: str = "fisher", outputs: bool = False) -> Found:
    return by_module(
        lora_statistics(
            task.model,
            {target.module: [each.rows for each in target.siblings] for target in task.targets},
            task.few,
            kind=kind,
            outputs=outputs,
            seed=task.data.cut.seed,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
        )
    )


GATHERER = Gatherer("lora", ("lora_inputs", "lora_outputs"), _gather)
