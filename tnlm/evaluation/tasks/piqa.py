"""PIQA: which of two ways reaches a goal."""

from __future__ import annotations

from tnlm.evaluation.tasks.base import (
    ACC,
    ACC_NORM,
    Item,
    Row,
    Task,
    accuracy,
    choose,
    gold_of,
    plain,
    text_of,
)


def adapt(row: Row) -> Row:
    """Read the plain columns, or ``goal``, ``sol1``, ``sol2`` and ``label``."""
    if "query" in row:
        return plain(row)
    choices = [text_of(row, "sol1"), text_of(row, "sol2")]
    gold = gold_of(row["label"], choices)
    return {"query": text_of(row, "goal"), "choices": choices, "gold": gold}


def item(row: Row) -> Item:
    """Ask how to reach the goal, and score both ways."""
    return choose(f"Question: {row['query']}\nAnswer:", row)


TASK = Task(
    name="piqa",
    source="Bisk et al., arXiv 1911.11641; lm-eval piqa 1.0",
    metrics=(ACC, ACC_NORM),
    adapt=adapt,
    item=item,
    score=accuracy,
    online="piqa",
    harness={
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{query}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
    },
)
