"""What plain training loops share: batches drawn at random, and weights restored on failure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.labels import check_labels, count_predictions
from tnlm.errors import CalibrationError, OptionError, TrainingError

LARGEST = 1.0
"""Norm to which the gradients of all parameters together are clipped."""

Batches = Sequence[Mapping[str, Tensor]]


@contextmanager
def guarded(
    model: PreTrainedModel, trained: Sequence[nn.Parameter], seed: int
) -> Iterator[Sequence[nn.Parameter]]:
    """Train parameters of a model while a block of code runs, in train mode, from a seed.

    If the block fails, or leaves a parameter that is not finite, all of these and the buffers are
    what they were; copies wait on the CPU. Either way flags and torch's random state are as they
    were.

    Args:
        model: changed in place.
        trained: these require gradients in the block, and no others.
        seed: of torch's generators in the block.
    """
    held = [(t, t.detach().to("cpu", copy=True)) for t in (*trained, *model.buffers())]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    chosen = {id(parameter) for parameter in trained}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        with (
            torch.random.fork_rng([model.device] if model.device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            torch.manual_seed(seed)
            model.train()
            yield trained
        _check_finite(model)
    except BaseException:
        with torch.no_grad():
            for tensor, values in held:
                tensor.copy_(values)
        raise
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for module, training in modes:
            module.training = training


def in_turn(model: PreTrainedModel, batches: Batches, steps: int) -> Iterator[dict[str, Tensor]]:
    """Yield a batch for every step, on the model's device, each once before any comes again."""
    rows: list[int] = []
    for _ in range(steps):
        rows = rows or torch.randperm(len(batches)).tolist()
        yield {key: value.to(model.device) for key, value in batches[rows.pop()].items()}


def backward(loss: Tensor | None, step: int, steps: int) -> None:
    """Take the gradients of a loss.

    Raises:
        TrainingError: if it is not finite.
    """
    value = math.nan if loss is None else float(loss.detach())
    if loss is None or not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at step {step} of {steps}; the weights are restored; try a lower "
            "learning_rate"
        )
    loss.backward()


def clip(parameters: Sequence[nn.Parameter], step: int, steps: int) -> None:
    """Clip gradients.

    Raises:
        TrainingError: if one is not finite.
    """
    if not bool(torch.nn.utils.clip_grad_norm_(parameters, LARGEST).isfinite()):
        raise TrainingError(
            f"the gradients at step {step} of {steps} are not finite; the weights are restored; "
            "try a lower learning_rate"
        )


def usable(model: PreTrainedModel, batches: Batches) -> Batches:
    """Return the batches that predict anything.

    Raises:
        CalibrationError: if there is none, or one has no labels.
    """
    check_labels(model, batches)
    found = [batch for batch in batches if count_predictions(model, batch["labels"])]
    if not found:
        raise CalibrationError("the batches have labels, but none that is predicted")
    return found


def check_course(steps: int | None, least: int, learning_rate: float) -> None:
    """Raise `OptionError` unless a training has steps and a learning rate.

    Args:
        steps: None for a default.
        least: fewest steps.
        learning_rate: must be above 0.
    """
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if steps is not None and not (whole and steps >= least):
        raise OptionError(f"steps={steps!r}; allowed: a whole number >= {least}")
    if not 0 < learning_rate < math.inf:
        raise OptionError(f"learning_rate={learning_rate!r}; allowed: a number above 0")


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise TrainingError(
                f"{name} is not finite after the last step; the weights are restored; try a lower "
                "learning_rate"
            )
