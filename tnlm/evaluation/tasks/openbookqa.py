"""OpenBookQA: elementary science questions that take more than a lookup."""

from __future__ import annotations

from tnlm.evaluation.tasks.base import ACC, ACC_NORM, Row, Task, multiple_choice
from tnlm.evaluation.tasks.columns import labelled, plain, text_of, texts_of


def adapt(row: Row) -> Row:
    """Read the plain columns, or ``question_stem``, ``choices`` and ``answerKey``."""
    if "query" in row:
        return plain(row)
    choices = texts_of(row["choices"], "text")
    gold = labelled(row["answerKey"], row["choices"]["label"], choices)
    return {"query": text_of(row, "question_stem"), "choices": choices, "gold": gold}


TASK = Task(
    name="openbookqa",
    source="Mihaylov et al., arXiv 1809.02789; lm-eval openbookqa 1.0",
    metrics=(ACC, ACC_NORM),
    adapt=adapt,
    config=multiple_choice("query"),
    online="openbookqa/openbookqa",
)
