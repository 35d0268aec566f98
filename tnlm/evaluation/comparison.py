"""Computes figures of scored items, and compares two models on the same items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, replace

from tnlm.errors import EvaluationError
from tnlm.evaluation.flips import Flips, flips
from tnlm.evaluation.results import Evaluation, Figure, TaskResult
from tnlm.evaluation.statistics import paired_stderr, stderr_of, value_of
from tnlm.evaluation.tasks.base import Scores, TaskMetric


def figures(
    metrics: Sequence[TaskMetric], items: Sequence[Scores], seed: int
) -> tuple[Figure, ...]:
    """Return the figures of all metrics for which items have scores, with standard errors."""
    found = []
    for metric in metrics:
        value = value_of(metric, items)
        if value is not None:
            stderr = stderr_of(metric, items, seed)
            found.append(Figure(metric.name, value, stderr, metric.higher_is_better))
    return tuple(found)


def digest(asked: object) -> str:
    """Return a hash of the questions.

    Example:
        >>> digest([("2 + 2 =", " 4")]) == digest([("2 + 2 =", " 5")])
        False
    """
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def compared(
    result: TaskResult, before: Evaluation, metrics: Sequence[TaskMetric], seed: int
) -> TaskResult:
    """Add the baseline's figures, the differences and the flips to a result.

    Raises:
        EvaluationError: if the baseline did not answer the same questions.
    """
    old = before[result.task]
    if old.digest != result.digest:
        raise EvaluationError(
            f"{result.task}: the baseline answered other questions (n={old.n}, "
            f"num_fewshot={old.num_fewshot}, now n={result.n}, num_fewshot={result.num_fewshot}); "
            "use the same data, limit, num_fewshot, max_new_tokens, seed and scorer",
            argument="num_fewshot",
        )
    by_name = {metric.name: metric for metric in metrics}
    found = []
    for figure in result.figures:
        then = old[figure.metric].value
        error = paired_stderr(by_name[figure.metric], result.items, old.items, seed)
        found.append(
            replace(
                figure,
                baseline=then,
                difference=figure.value - then,
                difference_stderr=error,
            )
        )
    changes = _flips(result.right, result.items, old.items, result.skipped)
    return replace(result, figures=tuple(found), flips=changes)


def _flips(
    right: str, now: Sequence[Scores], before: Sequence[Scores], skipped: Sequence[int]
) -> Flips | None:
    """Return the changes in correctness, or None if items have no such score."""
    if not right or not all(right in each for each in (*now, *before)):
        return None
    found = flips([each[right] for each in before], [each[right] for each in now])
    scored = [n for n in range(len(now) + len(skipped)) if n not in skipped]
    return Flips(*(tuple(scored[i] for i in where) for where in astuple(found)))
