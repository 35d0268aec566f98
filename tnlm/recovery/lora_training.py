"""Trains adapters towards a goal."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from tnlm.calibration.data import fingerprint
from tnlm.calibration.labels import count_predictions
from tnlm.errors import CalibrationError, TrainingError
from tnlm.layers.adapters import Adapter, Lora
from tnlm.parallel.workers import Workers
from tnlm.recovery.goals import Goal, own_loss
from tnlm.recovery.sharing import average, in_steps, team

logger = logging.getLogger("tnlm")

WARM_UP = 0.1
"""Fraction of the steps in which the learning rate rises; it then falls along a cosine to 0."""

SAMPLE = 8
"""Number of batches on which the loss is measured before and after."""

SHORTEST = 1 / 8
"""Least fraction of the way to the trained adapters that is tried."""


def _tokens(batch: Mapping[str, Tensor]) -> int:
    """Return the number of tokens that are not padding."""
    mask = batch.get("attention_mask")
    return next(iter(batch.values())).numel() if mask is None else int(mask.sum())


def schedule_of(batches: Sequence[Mapping[str, Tensor]], tokens: int, seed: int) -> list[int]:
    """Return the batch index of each step, for a number of tokens."""
    counts = [_tokens(batch) for batch in batches]
    if not all(counts):
        raise CalibrationError(f"batch {counts.index(0)} has only padding")
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    seen = 0
    while seen < tokens:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            if seen < tokens:
                order.append(index)
                seen += counts[index]
    return order


def train(
    model: PreTrainedModel,
    adapters: Mapping[str, Adapter],
    batches: Sequence[Mapping[str, Tensor]],
    order: Sequence[int],
    learning_rate: float,
    progress: bool,
    goal: Goal = own_loss,
    measured: Sequence[Mapping[str, Tensor]] | None = None,
) -> None:
    """Train the adapters, and go back from there as far as that lowers the loss.

    Half the way from their start is tried, then a quarter and so on while the loss falls; the
    start is restored if what is left is no better. Several processes take one batch each in every
    step.

    Args:
        model: the model, with the adapters in it.
        adapters: the adapters, by name.
        batches: batches with labels.
        order: the batch of every step.
        learning_rate: peak learning rate of AdamW.
        progress: show a progress bar.
        goal: the loss.
        measured: batches on which the loss must fall; ``batches`` by default.
    """
    shown = batches if measured is None else measured
    with team() as workers:
        workers.check_same(data=fingerprint(map(dict, batches)), order=list(order))
        before = {name: adapter.lora() for name, adapter in adapters.items()}
        first = _mean_loss(model, goal, shown, workers)
        steps = in_steps(order, workers)
        _train(_Step(model, goal, batches, workers), adapters, steps, learning_rate, progress)
        trained = {name: adapter.lora() for name, adapter in adapters.items()}
        whole = least = _mean_loss(model, goal, shown, workers)
        part = 1.0
        while part > SHORTEST:
            _go(adapters, before, trained, part / 2)
            loss = _mean_loss(model, goal, shown, workers)
            if loss >= least:
                break
            part, least = part / 2, loss
    logger.info("healed in %d steps: loss %.4f -> %.4f", len(steps), first, least)
    if not least < first:
        logger.warning("healing did not lower the loss (%.5g -> %.5g): undone", first, least)
        part = 0.0
    elif part < 1:
        logger.info("kept %g of the change; all of it gives %.5g", part, whole)
    _go(adapters, before, trained, part)


def _go(
    adapters: Mapping[str, Adapter],
    start: Mapping[str, Lora],
    end: Mapping[str, Lora],
    part: float,
) -> None:
    """Set the adapters to a part of the way from their start to their end, 0 to 1."""
    for name, adapter in adapters.items():
        first, last = start[name], end[name]
        A, B = first.A.lerp(last.A, part), first.B.lerp(last.B, part)
        adapter.fill(replace(first, A=A, B=B))


@dataclass(frozen=True)
class _Step:
    """Computes the gradients of one batch, averaged over processes."""

    model: PreTrainedModel
    goal: Goal
    batches: Sequence[Mapping[str, Tensor]]
    workers: Workers

    def backward(self, index: int | None, parameters: Sequence[nn.Parameter]) -> bool:
        """Compute the gradients, and return whether there are any."""
        count = 0
        if index is not None:
            loss = _loss(self.model, self.goal, self.batches[index], index)
            if loss is not None and loss.requires_grad:
                loss.backward()
                count = count_predictions(self.model, self.batches[index]["labels"])
        return average(parameters, count, self.workers)


def _train(
    step: _Step,
    adapters: Mapping[str, Adapter],
    steps: Sequence[int | None],
    learning_rate: float,
    progress: bool,
) -> None:
    parameters = [p for adapter in adapters.values() for p in (adapter.A, adapter.B)]
    adam = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rising = round(WARM_UP * len(steps))  # none of a few steps, the first of which would do nothing
    schedule = get_cosine_schedule_with_warmup(adam, rising, len(steps) + 1)
    hidden = not progress or step.workers.rank > 0
    with torch.inference_mode(False), torch.enable_grad():
        for index in tqdm(steps, desc="healing", unit="step", disable=hidden):
            adam.zero_grad()
            if step.backward(index, parameters):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                adam.step()
            schedule.step()


def _loss(
    model: PreTrainedModel, goal: Goal, batch: Mapping[str, Tensor], index: int
) -> Tensor | None:
    """Return the mean loss of a batch, or None if there is nothing to predict."""
    here = {key: value.to(model.device) for key, value in batch.items()}
    if not count_predictions(model, here["labels"]):
        return None
    torch.clear_autocast_cache()  # casts of adapters, made before they changed or without gradients
    loss = goal(model, here)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value} on batch {index}; lower learning_rate")
    return loss


@torch.no_grad()
def _mean_loss(
    model: PreTrainedModel,
    goal: Goal,
    batches: Sequence[Mapping[str, Tensor]],
    workers: Workers,
) -> float:
    some = workers.mine(range(0, len(batches), max(1, len(batches) // SAMPLE)))
    losses = [float(loss) for i in some if (loss := _loss(model, goal, batches[i], i)) is not None]
    losses = [loss for found in workers.gather(losses) for loss in found]
    if not losses:
        raise CalibrationError("the batches have labels, but none of them is predicted")
    return sum(losses) / len(losses)
