"""MMLU: exam questions of 57 subjects, answered by a letter."""

from __future__ import annotations

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import (
    ACC,
    Item,
    Row,
    Task,
    accuracy,
    gold_of,
    text_of,
    texts_of,
)

LETTERS = ("A", "B", "C", "D")


def adapt(row: Row) -> Row:
    """Read ``query`` or ``question``, four ``choices``, ``gold`` or ``answer``, and ``subject``."""
    choices = texts_of(row, "choices")
    if len(choices) != len(LETTERS):
        raise EvaluationError(f"{len(choices)} choices, but MMLU has {len(LETTERS)}")
    known = "query" in row
    return {
        "query": text_of(row, "query" if known else "question"),
        "choices": choices,
        "gold": gold_of(row["gold" if known else "answer"], choices),
        "subject": text_of(row, "subject"),
    }


def item(row: Row) -> Item:
    """List the choices under the question, and score the letters."""
    options = "\n".join(
        f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True)
    )
    prompt = f"{row['query'].strip()}\n{options}\nAnswer:"
    subject = row["subject"].replace("_", " ")
    return Item(
        pairs=tuple((prompt, f" {letter}") for letter in LETTERS),
        gold=row["gold"],
        choices=LETTERS,
        shot=f"{prompt} {LETTERS[row['gold']]}",
        group=row["subject"],
        description="The following are multiple choice questions (with answers) about "
        f"{subject}.\n\n",
    )


TASK = Task(
    name="mmlu",
    source="Hendrycks et al., arXiv 2009.03300; lm-eval mmlu 2",
    metrics=(ACC,),
    adapt=adapt,
    item=item,
    score=accuracy,
    online="mmlu",
    harness={
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about "
        "{{subject|replace('_', ' ')}}.\n\n",
        "doc_to_text": "{{query.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
        "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": list(LETTERS),
    },
    sampler="first",
    split_by="subject",
    balance="subject",
)
