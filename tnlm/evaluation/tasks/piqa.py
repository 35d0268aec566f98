"""PIQA: which of two methods reaches a goal."""

from __future__ import annotations

from tnlm.evaluation.tasks.base import ACC, ACC_NORM, Row, Task, multiple_choice
from tnlm.evaluation.tasks.columns import gold_of, plain, text_of, texts_of


def adapt(row: Row) -> Row:
    """Read the plain columns, or ``goal``, ``sol1``, ``sol2`` and ``label``."""
    if "query" in row:
        return plain(row)
    choices = texts_of({"solutions": [text_of(row, "sol1"), text_of(row, "sol2")]}, "solutions")
    gold = gold_of(row["label"], choices)
    return {"query": text_of(row, "goal"), "choices": choices, "gold": gold}


TASK = Task(
    name="piqa",
    source="Bisk et al., arXiv 1911.11641; lm-eval piqa 1.0",
    metrics=(ACC, ACC_NORM),
    adapt=adapt,
    config=multiple_choice("Question: {{query}}\nAnswer:"),
    online="piqa/piqa",
)
