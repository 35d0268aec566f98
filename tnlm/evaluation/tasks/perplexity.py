"""Perplexity of a text, window by window, under the protocol of `tnlm.perplexity`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnlm.evaluation.number import exponential
from tnlm.evaluation.tasks.base import Scores, Task, TaskMetric


def perplexity(scores: Sequence[Scores]) -> float:
    """Return the exponential of the mean loss over windows of equal length.

    Example:
        >>> perplexity([{"loss": 0.0}, {"loss": 0.0}])
        1.0
    """
    return exponential(math.fsum(each["loss"] for each in scores) / len(scores))


TASK = Task(
    name="perplexity",
    source="tnlm.perplexity: non-overlapping windows from the start of the text",
    metrics=(
        TaskMetric("perplexity", higher_is_better=False, aggregate=perplexity),
        TaskMetric("loss", higher_is_better=False),
    ),
    adapt=dict,
    right="",
)
