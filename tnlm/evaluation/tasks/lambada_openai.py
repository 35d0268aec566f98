"""LAMBADA: the last word of a passage, in OpenAI's version of the texts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnlm.errors import EvaluationError
from tnlm.evaluation.number import exponential
from tnlm.evaluation.tasks.base import ACC, Row, Scores, Task, TaskMetric
from tnlm.evaluation.tasks.columns import text_of


def adapt(row: Row) -> Row:
    """Read ``context`` and ``target``, or ``text`` whose last word is the target."""
    if "text" in row:
        text = text_of(row, "text")
        words = text.split(" ")
        context, target = " ".join(words[:-1]), f" {words[-1]}"
    else:
        context, target = text_of(row, "context"), text_of(row, "target")
    if not target.strip():
        raise EvaluationError("no gold answer: the target is empty")
    return {"context": context, "target": target}


def perplexity(scores: Sequence[Scores]) -> float:
    """Return the perplexity per target, not per token.

    Example:
        >>> round(perplexity([{"loglikelihood": -2.0}, {"loglikelihood": -4.0}]), 3)
        20.086
    """
    return exponential(-math.fsum(each["loglikelihood"] for each in scores) / len(scores))


TASK = Task(
    name="lambada_openai",
    source="Paperno et al., arXiv 1606.06031; lm-eval lambada_openai 1.0",
    metrics=(TaskMetric("perplexity", higher_is_better=False, aggregate=perplexity), ACC),
    adapt=adapt,
    config={
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "target",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "mean", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    online="lambada/lambada_openai",
)
