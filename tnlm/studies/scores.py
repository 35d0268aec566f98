"""How well a model does on data, and which score counts as well enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tnlm.calibration.data import Batch
from tnlm.calibration.loss import IGNORED
from tnlm.errors import EvaluationError, OptionError, did_you_mean
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.number import finite

METRICS = ("accuracy", "loss")

Metric = str | Callable[[Any], float]
"""``"loss"``, ``"accuracy"``, or what returns the score of a model, higher for a better one."""


@dataclass(frozen=True)
class Goal:
    """The score from which a training counts as good as a full one.

    Attributes:
        target: the score.
        falls: whether lower scores are better.
    """

    target: float
    falls: bool

    def met(self, score: float) -> bool:
        """Tell whether a score is good enough."""
        return score <= self.target if self.falls else score >= self.target


def measure(model: Any, metric: Metric, batches: Sequence[Batch]) -> float:
    """Return a model's score: mean loss of a prediction, share of classes right, or a callable's.

    Raises:
        EvaluationError: if the score is no finite number.

    Example:
        >>> measure(None, lambda model: 0.5, [])
        0.5
    """
    with evaluating(*([model] if isinstance(model, nn.Module) else [])):
        if callable(metric):
            score = metric(model)
        elif metric == "accuracy":
            score = _accuracy(model, batches)
        else:
            score = _loss(model, batches)
    name = name_of(metric)
    if isinstance(score, bool):
        raise EvaluationError(f"{name} of {type(model).__name__} is {score}; it must be a number")
    return finite(score, f"{name} of {type(model).__name__}")


def name_of(metric: Metric) -> str:
    """Return what a metric is called.

    Example:
        >>> name_of("loss"), name_of(len)
        ('loss', 'len')
    """
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "callable")


def check_metric(metric: Metric, kind: str) -> None:
    """Refuse a metric that is unknown, or that a kind of model does not have.

    Args:
        metric: as asked for.
        kind: as `tnlm.recovery.tasks.model_kind` says.

    Example:
        >>> check_metric("loss", "causal")
    """
    if callable(metric):
        return
    if metric not in METRICS:
        raise OptionError(f"metric={metric!r}{did_you_mean(str(metric), METRICS)}, or a callable")
    if metric == "accuracy" and kind != "classes":
        raise OptionError(
            f"metric='accuracy' counts classes, but the model is a {kind} language model; use "
            "'loss', or a callable that takes the model"
        )


def goal_of(metric: Metric, start: float, full: float, threshold: float) -> Goal:
    """Return the score to be met.

    An accuracy, or a callable's score, is to reach ``threshold`` times that of the full training,
    as published. A loss has no natural zero: it is to fall by ``threshold`` times as much as in
    the full training.

    Args:
        metric: what the scores are.
        start: score before any training.
        full: score after training all parameters.
        threshold: e.g. 0.9.

    Raises:
        EvaluationError: if the full training is no better than none, or nothing needs training.

    Example:
        >>> goal_of("loss", 4.0, 2.0, 0.75), goal_of("accuracy", 0.5, 0.9, 0.9).target
        (Goal(target=2.5, falls=True), 0.81)
    """
    falls = metric == "loss"
    if full == start or (full > start) is falls:
        raise EvaluationError(
            f"training all parameters takes the score from {start:.6g} to {full:.6g}, no better: "
            "it says nothing about a subspace; use more steps, another learning_rate, or another "
            "metric"
        )
    if not falls and full <= 0:
        raise EvaluationError(
            f"the full training scores {full:.6g}; a share of that has no meaning: need above 0"
        )
    goal = Goal(start + threshold * (full - start) if falls else threshold * full, falls)
    if goal.met(start):
        raise EvaluationError(
            f"the score is {start:.6g} without any training, and {goal.target:.6g} is enough "
            f"({threshold:g} of the full training's {full:.6g}); use a higher threshold="
        )
    return goal


def _loss(model: Any, batches: Sequence[Batch]) -> float:
    losses, counts = [], []
    for batch in batches:
        count = int((batch["labels"] != IGNORED).sum())
        loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
        losses.append(float(loss.double()) * count)
        counts.append(count)
    return math.fsum(losses) / sum(counts)


def _accuracy(model: Any, batches: Sequence[Batch]) -> float:
    right = count = 0
    for batch in batches:
        moved = {name: tensor.to(model.device) for name, tensor in batch.items()}
        logits = model(**moved).logits
        if not bool(logits.isfinite().all()):
            return math.nan
        right += int((logits.argmax(-1) == moved["labels"]).sum())
        count += len(logits)
    return right / count
