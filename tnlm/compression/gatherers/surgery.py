"""What LLM Surgeon keeps of every matrix: the model is operated on and measured in turn."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.allocation.pricing import model_cost
from tnlm.calibration.statistics import collect
from tnlm.compression.gatherers.base import Found, Gatherer, Task, by_module, from_gradients
from tnlm.decompositions.submatrix import SHOTS
from tnlm.metrics.measure import GRADIENTS, INPUTS, SURGERY
from tnlm.metrics.sides import Side
from tnlm.plans.plan import total
from tnlm.recovery.pruning.surgeon import Sides, operate
from tnlm.targets.base import Member


def _gather(task: Task) -> Found:
    shots, model = task.request.options.get("shots", SHOTS), copy.deepcopy(task.model)
    dense = total(target.dense_cost(target.weight(model).element_size()) for target in task.targets)
    keep = task.request.limits(model_cost(model), dense).keep
    found = operate(model, task.targets, keep, shots, partial(_examine, task, model))

    def read(target: Member, name: str) -> Tensor:
        kept = found[target.name]
        if name == "core":
            return kept.core(target.weight(model))
        return kept.rows if name == "kept_rows" else kept.columns

    return Found(read)


def _examine(task: Task, model: PreTrainedModel, shot: int) -> Sides:
    """Return the statistics of the dense model, or gather those of the model as it is."""
    inputs, gradients = (
        (task.earlier[INPUTS], task.earlier[GRADIENTS]) if shot == 0 else _again(task, model)
    )
    device, damping = model.device, task.request.damping

    def side(found: Found, name: str, target: Member, kept: Tensor) -> Tensor:
        values = target.statistic(name, found.read)[kept][:, kept]
        return Side(values.to(device), damping).values

    def sides(target: Member, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        outputs = side(gradients, "gradient", target, rows)
        return outputs, side(inputs, "moment", target, columns)

    return sides


def _again(task: Task, model: PreTrainedModel) -> tuple[Found, Found]:
    """Gather statistics of a changed model, all from the sequences for gradients."""
    changed = replace(task, model=model, batches=task.few)
    inputs = collect(
        model,
        task.modules,
        task.few,
        cache_dir=task.data.cache_dir,
        progress=task.progress,
        workers=task.workers,
    )
    return by_module(inputs), from_gradients(changed, moment="full", labels="sampled")


GATHERER = Gatherer(SURGERY, ("kept_rows", "kept_columns", "core"), _gather)
