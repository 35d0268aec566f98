"""Block refinement: tune a block's factors to reproduce the output of the dense block.

After fitting, the compressed stream runs through a block's fitted layers, the dense stream through
the dense block, and a few steps of Adam on the factors, biases and norms bring the outputs
together. This works for any format: it trains whatever parameters the fitted layers have.

Source: AA-SVD's block-wise refinement.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.calibration.walk import Call, call_block, eval_mode, first_states
from tnlm.compression.cascade import open_walk
from tnlm.errors import CalibrationError

LEARNING_RATE = 1e-4
WARM_UP = 0.1
"""Fraction of the steps in which the learning rate rises; it then falls along a cosine to 0."""

Take = Callable[[str], Mapping[str, nn.Module]]
"""Returns the fitted modules of a block, by dotted name; they are trained in place, except
parameters that require no gradient."""


def refine(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    tokens: int,
    take: Take,
    keep: Callable[[str, Mapping[str, nn.Module]], None],
    *,
    weigh: Callable[[str], Tensor | None] = lambda _: None,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Tune fitted modules block by block, without changing the model.

    Args:
        model: the dense model; its blocks must form one stack that can be walked.
        modules: dotted names of the fitted modules.
        batches: calibration data of one length, without padding.
        tokens: how many tokens to tune each block on; data that is too short is repeated.
        take: returns the fitted modules of a block.
        keep: receives the tuned modules of a block, by dotted name: the fitted ones, and norms.
        weigh: returns the square root of the metric for a block's output error, or None to weight
            all directions equally.
        learning_rate: peak learning rate of Adam.
        seed: draws the order of the data.
        progress: show a progress bar.

    Raises:
        CalibrationError: if the blocks cannot be walked, or tuning diverges.
    """
    with eval_mode(model), torch.no_grad():
        blocks, calls = open_walk(model, modules, batches)
        dense = list(first_states(model, blocks, batches))
        compressed = list(dense)
        bar = tqdm(blocks, desc="refining", unit="block", disable=not progress)
        for (name, block), given in zip(bar, calls, strict=True):
            call = _in_float(given)
            wanted = [call_block(block, state, given) for state in dense]
            student = copy.deepcopy(block).float()
            fitted = take(name)
            for full, module in fitted.items():
                student.set_submodule(full.removeprefix(name + "."), module.float())
            if fitted:
                norms = _norms(student)
                free = [p for m in fitted.values() for p in m.parameters() if p.requires_grad]
                chosen = [*free, *(p for norm in norms.values() for p in norm.parameters())]
                lesson = _Lesson(student, call, compressed, wanted, weigh(name))
                _tune(lesson, chosen, tokens, learning_rate, seed, name)
            compressed = [call_block(student, state.float(), call) for state in compressed]
            dense = wanted
            if fitted:
                tuned = {**fitted, **{f"{name}.{local}": m for local, m in norms.items()}}
                keep(name, {full: module.to(_dtype(model, full)) for full, module in tuned.items()})


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    return next(model.get_submodule(name).parameters()).dtype


def _norms(block: nn.Module) -> dict[str, nn.Module]:
    """Return the norms by local name: leaf modules whose parameters are all vectors."""
    found = {}
    for name, module in block.named_modules():
        own = list(module.parameters())
        if own and not list(module.children()) and all(p.dim() == 1 for p in own):
            found[name] = module
    return found


@dataclass(frozen=True)
class _Lesson:
    """A block, its inputs, and the outputs it should produce."""

    student: nn.Module
    call: Call
    inputs: Sequence[Tensor]
    wanted: Sequence[Tensor]
    root: Tensor | None

    def loss(self, index: int) -> Tensor:
        """Return the squared error of one batch, relative to the wanted output."""
        wanted = self.wanted[index].float()
        error = call_block(self.student, self.inputs[index].float(), self.call) - wanted
        if self.root is not None:
            error, wanted = error @ self.root.to(error), wanted @ self.root.to(error)
        return error.square().mean() / wanted.square().mean().clamp_min(1e-30)

    def sample(self) -> float:
        """Return the mean loss of a few batches, to check whether tuning helped."""
        with torch.no_grad():
            some = range(0, len(self.inputs), max(1, len(self.inputs) // 8))
            return sum(float(self.loss(index)) for index in some) / len(some)


def _tune(
    lesson: _Lesson,
    parameters: Sequence[nn.Parameter],
    tokens: int,
    learning_rate: float,
    seed: int,
    name: str,
) -> None:
    """Minimise the squared output error with Adam; restore the start if that does not help."""
    lesson.student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    steps = max(1, round(tokens / lesson.inputs[0].shape[:-1].numel()))
    before = copy.deepcopy([p.detach() for p in parameters])
    first = lesson.sample()
    if not math.isfinite(first):
        raise CalibrationError(f"the output of {name} is not finite on the calibration data")
    adam = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _rate(step, steps))
    order = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    with torch.enable_grad():
        for _ in range(steps):
            rows = rows or torch.randperm(len(lesson.inputs), generator=order).tolist()
            adam.zero_grad()
            lesson.loss(rows.pop()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            schedule.step()
    adam.zero_grad()
    if not lesson.sample() < first:
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)


def _rate(step: int, steps: int) -> float:
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _in_float(value: Any) -> Any:
    """Return a block's other arguments with floating-point tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(map(_in_float, value))
    return {k: _in_float(v) for k, v in value.items()} if isinstance(value, dict) else value
