"""OpenBookQA: elementary science, beyond looking it up."""

from __future__ import annotations

from tnlm.evaluation.tasks.base import (
    ACC,
    ACC_NORM,
    Item,
    Row,
    Task,
    accuracy,
    choose,
    labelled,
    plain,
    text_of,
    texts_of,
)


def adapt(row: Row) -> Row:
    """Read the plain columns, or ``question_stem``, ``choices`` and ``answerKey``."""
    if "query" in row:
        return plain(row)
    choices = texts_of(row["choices"], "text")
    gold = labelled(row["answerKey"], row["choices"]["label"], choices)
    return {"query": text_of(row, "question_stem"), "choices": choices, "gold": gold}


def item(row: Row) -> Item:
    """Score the answers straight after the stem."""
    return choose(row["query"], row)


TASK = Task(
    name="openbookqa",
    source="Mihaylov et al., arXiv 1809.02789; lm-eval openbookqa 1.0",
    metrics=(ACC, ACC_NORM),
    adapt=adapt,
    item=item,
    score=accuracy,
    online="openbookqa",
    harness={
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
    },
)
