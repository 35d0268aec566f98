"""Trains the parameters of a space with one recipe, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tnlm.calibration.data import Batch
from tnlm.errors import OptionError, TrainingError
from tnlm.recovery.examples import Examples, collate
from tnlm.studies.analysis.subspace import Space
from tnlm.utils.checks import check_whole, is_real
from tnlm.utils.training_flags import modes_kept


@dataclass(frozen=True)
class TrainingConfig:
    """A training with Adam, whose learning rate falls linearly to 0.

    Attributes:
        steps: number of steps.
        batch_size: examples per step.
        learning_rate: rate of the first step when all parameters move; see ``Space.groups``.
        pad: id that fills shorter sequences.

    Raises:
        OptionError: if a count is below 1, or the rate is not finite and above 0.
    """

    steps: int
    batch_size: int
    learning_rate: float
    pad: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            check_whole(name, getattr(self, name))
        rate = self.learning_rate
        if not is_real(rate) or rate <= 0:
            raise OptionError(f"learning_rate={rate!r}; allowed: a finite number above 0")


def train(space: Space, examples: Examples, config: TrainingConfig, seed: int = 0) -> None:
    """Train the parameters of a space on its model's own loss; the model is left unchanged.

    Args:
        space: the parameters to train.
        examples: used in random order, repeatedly.
        config: the training recipe.
        seed: draws the order, and dropout.

    Raises:
        TrainingError: if the loss is not finite; says at which step.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tnlm.studies.analysis.subspace import Subspace
        >>> from tnlm.recovery.examples import training_set
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> space = Subspace(model, d=4)
        >>> examples = training_set(torch.arange(64) % 9, max_length=16)
        >>> train(space, examples, TrainingConfig(steps=2, batch_size=2, learning_rate=1e-3))
        >>> bool(space.theta.abs().sum() > 0)
        True
    """
    device = next(space.parameters()).device
    with _training(space.model, device, seed):
        optimizer = torch.optim.Adam(space.groups(config.learning_rate))
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / config.steps)
        for step, batch in enumerate(_draw(examples, config, seed)):
            loss = space(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            if not bool(loss.isfinite()):
                count, name = sum(p.numel() for p in space.parameters()), type(space.model).__name__
                raise TrainingError(
                    f"training {count} parameters of {name}: the loss is {float(loss.detach())} at "
                    f"step {step} of {config.steps}; try a lower learning_rate than "
                    f"{config.learning_rate}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()


def _draw(examples: Examples, config: TrainingConfig, seed: int) -> Iterator[Batch]:
    """Yield one batch per step; every example is used once before any is used again."""
    generator, waiting = torch.Generator().manual_seed(seed), list[int]()
    size = min(config.batch_size, len(examples))
    for _ in range(config.steps):
        if len(waiting) < size:
            waiting += torch.randperm(len(examples), generator=generator).tolist()
        yield collate([examples[index] for index in waiting[:size]], config.pad)
        waiting = waiting[size:]


@contextmanager
def _training(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Put a model in training mode and seed its randomness for a block; restore both after."""
    with modes_kept(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        yield
