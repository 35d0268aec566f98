"""Standard errors of figures over items, alone and compared with a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import Scores, TaskMetric

RESAMPLES = 1000


def value_of(metric: TaskMetric, items: Sequence[Scores]) -> float | None:
    """Return the metric's value over items, or None if no item has its score.

    Example:
        >>> value_of(TaskMetric("acc"), [{"acc": 1.0}, {"acc": 0.0}])
        0.5
    """
    if metric.aggregate is not None:
        value = metric.aggregate(items)
    else:
        values = _values(metric, items)
        if not values:
            return None
        value = math.fsum(values) / len(values)
    if value is not None and not math.isfinite(value):
        raise EvaluationError(f"{metric.name} is {value}: a score is not finite")
    return value


def stderr_of(metric: TaskMetric, items: Sequence[Scores], seed: int) -> float | None:
    """Return the standard error of a metric's value, or None for a single item.

    For a mean, it is the sample standard deviation over the root of the number of items; for a
    fraction ``p`` of ``n`` items, this is ``sqrt(p * (1 - p) / (n - 1))``. For any other metric, it
    comes from a bootstrap.

    Example:
        >>> stderr_of(TaskMetric("acc"), [{"acc": 1.0}, {"acc": 0.0}], seed=0)
        0.5
    """
    if metric.aggregate is None:
        return mean_stderr(_values(metric, items))
    return _bootstrap(metric.aggregate, [items], seed)


def paired_stderr(
    metric: TaskMetric, items: Sequence[Scores], before: Sequence[Scores], seed: int
) -> float | None:
    """Return the standard error of the difference between two models on the same items.

    It is smaller than for independent samples, since items hard for both add nothing.
    """
    if metric.aggregate is not None:
        return _bootstrap(metric.aggregate, [items, before], seed)
    now, then = _values(metric, items), _values(metric, before)
    return mean_stderr([a - b for a, b in zip(now, then, strict=True)])


def mean_stderr(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, or None for fewer than two values.

    Example:
        >>> mean_stderr([1.0, 0.0])
        0.5
    """
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)


def _values(metric: TaskMetric, items: Sequence[Scores]) -> list[float]:
    return [each[metric.name] for each in items if metric.name in each]


def _bootstrap(
    aggregate: Callable[[Sequence[Scores]], float | None],
    samples: Sequence[Sequence[Scores]],
    seed: int,
) -> float | None:
    """Bootstrap over items; with two samples, over the same items of both, for the difference."""
    count = len(samples[0])
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(RESAMPLES):
        drawn = torch.randint(count, (count,), generator=generator).tolist()
        values = [aggregate([sample[index] for index in drawn]) for sample in samples]
        known = [value for value in values if value is not None]
        if len(known) == len(samples):  # else the draw lacks a group that the metric needs
            found.append(known[0] - sum(known[1:]))
    if len(found) < RESAMPLES // 2:
        return None
    mean = math.fsum(found) / len(found)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in found) / (len(found) - 1))
