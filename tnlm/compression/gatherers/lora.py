"""Squared gradients of a LoRA, which may be trained meanwhile and kept."""

import copy

import torch
from transformers import PreTrainedModel

from tnlm.calibration.lora import lora_statistics
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module

RANK = 8
STEPS = 100
"""Rank of the LoRA, and steps that train one that is kept, if the call does not say."""


def _gather(task: Task, kind: str = "fisher", outputs: bool = False, keep: bool = False) -> Found:
    asked = task.data
    steps = (STEPS if keep else 0) if asked.lora_steps is None else asked.lora_steps
    found = by_module(
        lora_statistics(
            task.model,
            {target.module: [each.rows for each in target.siblings] for target in task.targets},
            task.few,
            kind=kind,
            outputs=outputs,
            rank=RANK if asked.lora_rank is None else asked.lora_rank,
            step=0.0 if asked.lora_step is None else asked.lora_step,
            steps=steps,
            seed=task.data.cut.seed,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
            keep=keep,
        )
    )
    return Found(found.read, found.store, _with_lora(task, found)) if keep else found


@torch.no_grad()
def _with_lora(task: Task, found: Found) -> PreTrainedModel:
    """Return a copy of the model with the LoRA added to every matrix that it reached."""
    model = copy.deepcopy(task.model)
    for target in task.targets:
        if found.store is not None and target.module in found.store.leaders:
            A, B = (target.statistic(name, found.read).double() for name in ("lora_A", "lora_B"))
            weight, module = target.weight(model), model.get_submodule(target.module)
            sum_ = weight.double() + (B @ A).to(weight.device)
            target.write(module, module.weight.data, sum_)  # type: ignore[arg-type]
    return model


GATHERER = Gatherer("lora", ("lora_inputs", "lora_outputs", "lora_A", "lora_B"), _gather)
