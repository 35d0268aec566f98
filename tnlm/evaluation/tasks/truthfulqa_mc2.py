"""TruthfulQA with several right answers: the probability mass on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import ACC, Answer, Row, Scores, Task, multiple_choice
from tnlm.evaluation.tasks.columns import answers_of, text_of
from tnlm.evaluation.tasks.truthfulqa_mc1 import PROMPT


def adapt(row: Row) -> Row:
    """Read ``query``, ``mc2_choices``, ``mc2_labels``; or ``question`` and ``mc2_targets``.

    Empty answers are dropped.
    """
    if "query" in row:
        query = text_of(row, "query")
        choices, labels = answers_of(row, "mc2_choices", row["mc2_labels"])
    else:
        query, targets = text_of(row, "question"), row["mc2_targets"]
        choices, labels = answers_of(targets, "choices", targets["labels"])
    if not set(labels) <= {0, 1} or 1 not in labels:
        raise EvaluationError(
            f"no gold answer: labels must be 0 or 1, with at least one 1, got {labels}"
        )
    return {"query": query, "choices": choices, "labels": list(map(int, labels)), "gold": 0}


def true_share(row: Row, answers: Sequence[Answer]) -> Scores:
    """Return the fraction of the answers' probability that is on the true ones."""
    most = max(answer.loglikelihood for answer in answers)
    weights = [math.exp(answer.loglikelihood - most) for answer in answers]
    true = math.fsum(w for w, label in zip(weights, row["labels"], strict=True) if label == 1)
    return {"acc": true / math.fsum(weights)}


TASK = Task(
    name="truthfulqa_mc2",
    source="Lin et al., arXiv 2109.07958; lm-eval truthfulqa_mc2 3.0",
    metrics=(ACC,),
    adapt=adapt,
    config=multiple_choice(PROMPT),
    score=true_share,
    file="truthfulqa_mc",
    online="truthfulqa/truthfulqa_mc2",
    right="",
)
