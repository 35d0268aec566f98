"""Perplexity of a text, window by window, under the protocol of `tnlm.perplexity`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import Answer, Item, Metric, Row, Scores, Task, text_of


def adapt(row: Row) -> Row:
    """Read ``text``."""
    return {"text": text_of(row, "text")}


def item(row: Row) -> Item:
    """Return the text as it is."""
    return Item(pairs=(("", row["text"]),))


def score(item: Item, answers: Sequence[Answer]) -> Scores:
    """Return the mean loss of a token in one window."""
    return {"loss": -answers[0].loglikelihood / answers[0].tokens}


def perplexity(scores: Sequence[Scores]) -> float:
    """Return the exponential of the mean loss over windows, which are all of one length."""
    mean = math.fsum(each["loss"] for each in scores) / len(scores)
    if mean > math.log(1e300):
        raise EvaluationError(f"the mean loss is {mean:.0f}: its perplexity is not a float")
    return math.exp(mean)


TASK = Task(
    name="perplexity",
    source="tnlm.perplexity: non-overlapping windows from the start of the text",
    metrics=(
        Metric("perplexity", higher_is_better=False, aggregate=perplexity),
        Metric("loss", higher_is_better=False),
    ),
    adapt=adapt,
    item=item,
    score=score,
    kind="text",
    right="",
)
