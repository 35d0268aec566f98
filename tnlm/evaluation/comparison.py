"""Figures of scored items, and of two models on the same items."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

from tnlm.errors import EvaluationError
from tnlm.evaluation.results import Evaluation, Figure, Flips, TaskResult
from tnlm.evaluation.statistics import paired_stderr, stderr_of, value_of
from tnlm.evaluation.tasks.base import Metric, Scores


def figures(metrics: Sequence[Metric], items: Sequence[Scores], seed: int) -> tuple[Figure, ...]:
    """Return the figures that the items have scores for, with standard errors."""
    found = []
    for metric in metrics:
        value = value_of(metric, items)
        if value is not None:
            stderr = stderr_of(metric, items, seed)
            found.append(Figure(metric.name, value, stderr, metric.higher_is_better))
    return tuple(found)


def digest(asked: object) -> str:
    """Return a fingerprint of what was asked.

    Example:
        >>> digest([("2 + 2 =", " 4")]) == digest([("2 + 2 =", " 5")])
        False
    """
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def compared(
    result: TaskResult, before: Evaluation, metrics: Sequence[Metric], seed: int
) -> TaskResult:
    """Return a result with the baseline's figures, the differences and the flips.

    Raises:
        EvaluationError: if the baseline did not answer the same questions.
    """
    old = before[result.task]
    if old.digest != result.digest:
        raise EvaluationError(
            f"{result.task}: the baseline answered other questions (n={old.n}, "
            f"num_fewshot={old.num_fewshot}, now n={result.n}, num_fewshot={result.num_fewshot}); "
            "use the same data, limit, num_fewshot, seed and scorer"
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
    return replace(result, figures=tuple(found), flips=flips(result.right, result.items, old.items))


def flips(right: str, now: Sequence[Scores], before: Sequence[Scores]) -> Flips | None:
    """Return which items changed from wrong to right and back.

    Args:
        right: the score that is 1 for a right answer; without one there are no flips.
        now: scores of the items.
        before: scores of the same items by the baseline.

    Example:
        >>> flips("acc", [{"acc": 1.0}, {"acc": 0.0}], [{"acc": 0.0}, {"acc": 0.0}]).learned
        (0,)
    """
    if not right or not all(right in each for each in (*now, *before)):
        return None
    pairs = [(a[right] == 1, b[right] == 1) for a, b in zip(now, before, strict=True)]
    return Flips(
        learned=tuple(i for i, pair in enumerate(pairs) if pair == (True, False)),
        unlearned=tuple(i for i, pair in enumerate(pairs) if pair == (False, True)),
        both_right=pairs.count((True, True)),
        both_wrong=pairs.count((False, False)),
    )
