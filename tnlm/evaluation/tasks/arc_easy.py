"""ARC-Easy: school science questions that simple word statistics already answer."""

from __future__ import annotations

from tnlm.evaluation.tasks.base import ACC, ACC_NORM, Row, Task, multiple_choice
from tnlm.evaluation.tasks.columns import labelled, plain, text_of, texts_of


def adapt(row: Row) -> Row:
    """Read the plain columns, or ``question``, ``choices`` of text and label, ``answerKey``."""
    if "query" in row:
        return plain(row)
    choices = texts_of(row["choices"], "text")
    gold = labelled(row["answerKey"], row["choices"]["label"], choices)
    return {"query": text_of(row, "question"), "choices": choices, "gold": gold}


TASK = Task(
    name="arc_easy",
    source="Clark et al., arXiv 1803.05457; lm-eval arc_easy 1.0",
    metrics=(ACC, ACC_NORM),
    adapt=adapt,
    config=multiple_choice("Question: {{query}}\nAnswer:"),
    online="arc/arc_easy",
)
