"""Short trainings of a space beside a model: the same data, steps and rates whatever its size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tnlm.calibration.data import Batch
from tnlm.errors import OptionError, TrainingError
from tnlm.modes import modes_kept
from tnlm.recovery.examples import Examples, collate
from tnlm.studies.analysis.subspace import Space


@dataclass(frozen=True)
class Course:
    """How a space is trained: by Adam, at a rate that falls linearly to 0.

    Attributes:
        steps: how many.
        batch_size: examples of a step.
        learning_rate: of the first step, if all parameters moved; see ``Space.groups``.
        pad: id that fills shorter sequences.

    Raises:
        OptionError: for a count below 1, or a rate that is not finite and above 0.
    """

    steps: int
    batch_size: int
    learning_rate: float
    pad: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"{name}={value!r}; allowed: an integer of at least 1")
        rate = self.learning_rate
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise OptionError(f"learning_rate={rate!r}; allowed: finite numbers above 0")


def train(space: Space, examples: Examples, course: Course, seed: int = 0) -> None:
    """Train the parameters of a space on its model's own loss; the model stays as it is.

    Args:
        space: where the model's parameters may move.
        examples: used in a random order, again and again.
        course: how.
        seed: of the order, and of dropout.

    Raises:
        TrainingError: if the loss is not finite, with the step.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tnlm.studies.analysis.subspace import Subspace
        >>> from tnlm.recovery.examples import training_set
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> space = Subspace(model, d=4)
        >>> examples = training_set(torch.arange(64) % 9, max_length=16)
        >>> train(space, examples, Course(steps=2, batch_size=2, learning_rate=1e-3))
        >>> bool(space.theta.abs().sum() > 0)
        True
    """
    device = next(space.parameters()).device
    with _training(space.model, device, seed):
        optimizer = torch.optim.Adam(space.groups(course.learning_rate))
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / course.steps)
        for step, batch in enumerate(_draw(examples, course, seed)):
            loss = space(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            if not bool(loss.isfinite()):
                count, name = sum(p.numel() for p in space.parameters()), type(space.model).__name__
                raise TrainingError(
                    f"training {count} numbers of {name}: the loss is {float(loss.detach())} at "
                    f"step {step} of {course.steps}; try a lower learning_rate than "
                    f"{course.learning_rate}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()


def _draw(examples: Examples, course: Course, seed: int) -> Iterator[Batch]:
    """Yield a batch a step; every example comes once before any comes again."""
    generator, waiting = torch.Generator().manual_seed(seed), list[int]()
    size = min(course.batch_size, len(examples))
    for _ in range(course.steps):
        if len(waiting) < size:
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        yield collate([examples[index] for index in waiting[:size]], course.pad)
        waiting = waiting[size:]


@contextmanager
def _training(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Put a model in training mode, with randomness of its own; restore both after."""
    with modes_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        yield
