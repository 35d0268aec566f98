"""Training of one block's parameters towards wanted outputs, undone if held-out data says so."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnlm.calibration.states import States
from tnlm.calibration.walk import Call, call_block
from tnlm.errors import CalibrationError

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
WARM_UP = 0.1
"""Fraction of the steps in which the learning rate rises; it then falls along a cosine."""
FLOOR = 0.1
"""Fraction of the peak learning rate at the last step."""
STEPS = 200
"""Steps of the published training, on 32 windows each; fewer windows make smaller steps."""
HELD_OUT = 8
"""One window of so many is not trained on, and decides whether the training is kept."""


@dataclass(frozen=True)
class Gain:
    """The relative error of a block's output on held-out windows, before and after training.

    Both are the same if training did not lower the error, and was undone.
    """

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether training lowered the error."""
        return self.after < self.before


@dataclass(frozen=True)
class BlockTask:
    """A block, its inputs, and the outputs it should produce.

    Attributes:
        name: the block's, for messages.
        student: the block, in ``dtype``.
        call: its other arguments.
        inputs: a hidden state for each window.
        wanted: the output for each.
        root: square root of the metric for output errors; None to weight all directions equally.
        dtype: that of the computation.
    """

    name: str
    student: nn.Module
    call: Call
    inputs: States
    wanted: States
    root: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """Tokens of one window."""
        return next(self.inputs.like()).shape[:-1].numel()

    def loss(self, index: int) -> Tensor:
        """Return the squared error on one window, relative to the wanted output."""
        wanted = self.wanted[index].to(self.dtype)
        error = call_block(self.student, self.inputs[index].to(self.dtype), self.call) - wanted
        if self.root is not None:
            error, wanted = error @ self.root.to(error), wanted @ self.root.to(error)
        return error.square().mean() / wanted.square().mean().clamp_min(1e-30)

    def error(self, windows: Sequence[int]) -> float:
        """Return the relative error over some windows."""
        with torch.no_grad():
            return math.sqrt(sum(float(self.loss(index)) for index in windows) / len(windows))


def split_windows(windows: int) -> tuple[list[int], list[int]]:
    """Return which windows are trained on, and which are held out; a single one is both.

    Example:
        >>> split_windows(4)
        ([0, 1, 2], [3])
    """
    held = list(range(min(HELD_OUT, windows) - 1, windows, HELD_OUT))
    return [index for index in range(windows) if index not in held] or held, held


def tune(
    task: BlockTask,
    parameters: Mapping[nn.Parameter, torch.dtype],
    tokens: int,
    *,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
) -> Gain:
    """Minimise the squared output error with AdamW; restore the start if that does not help.

    Args:
        task: the block and its data.
        parameters: those to train, each with the dtype in which it will be stored, to which it is
            rounded before its error is measured.
        tokens: how many tokens to train on; data that is too short is repeated.
        learning_rate: the peak.
        seed: draws the order of the data.

    Raises:
        CalibrationError: if the block's output is not finite before training.
    """
    task.student.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    learned, held = split_windows(len(task.inputs))
    before = task.error(held)
    if not math.isfinite(before):
        raise CalibrationError(f"the output of {task.name} is not finite on the calibration data")
    start = copy.deepcopy([parameter.detach() for parameter in parameters])
    order = _order(learned, torch.Generator().manual_seed(seed))
    _train(task, list(parameters), order, *_sizes(tokens / task.tokens, learned), learning_rate)
    with torch.no_grad():
        for parameter, stored in parameters.items():
            parameter.copy_(parameter.to(stored))
        after = task.error(held)
        if after < before:
            return Gain(before, after)
        for parameter, old in zip(parameters, start, strict=True):
            parameter.copy_(old)
    return Gain(before, before)


def _sizes(windows: float, learned: Sequence[int]) -> tuple[int, int]:
    """Return the number of steps, and of windows in a step."""
    batch = min(max(1, round(windows / STEPS)), len(learned))
    return max(1, round(windows / batch)), batch


def _order(windows: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """Yield windows without end, every one once in each pass."""
    while True:
        drawn = torch.randperm(len(windows), generator=generator).tolist()
        yield from (windows[index] for index in drawn)


def _train(
    task: BlockTask,
    parameters: Sequence[nn.Parameter],
    order: Iterator[int],
    steps: int,
    batch: int,
    learning_rate: float,
) -> None:
    adam = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step, steps))
    with torch.enable_grad():
        for _ in range(steps):
            adam.zero_grad()
            for _ in range(batch):
                (task.loss(next(order)) / batch).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            adam.step()
            schedule.step()
    adam.zero_grad()


def rate(step: int, steps: int) -> float:
    """Return the learning rate of a step, as a fraction of the peak.

    Example:
        >>> [round(rate(step, 20), 2) for step in (0, 1, 2, 10, 19, 20)]
        [0.5, 1.0, 1.0, 0.63, 0.11, 0.1]
    """
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    return FLOOR + (1 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * share))
