"""MMLU: exam questions in 57 subjects, answered by a letter."""

from __future__ import annotations

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import ACC, Row, Task, multiple_choice
from tnlm.evaluation.tasks.columns import gold_of, text_of, texts_of

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


TASK = Task(
    name="mmlu",
    source="Hendrycks et al., arXiv 2009.03300; lm-eval mmlu 2",
    metrics=(ACC,),
    adapt=adapt,
    config=multiple_choice(
        "{{query.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
        "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        doc_to_choice=list(LETTERS),
        description="The following are multiple choice questions (with answers) about "
        "{{subject|replace('_', ' ')}}.\n\n",
        fewshot_config={"sampler": "first_n"},
    ),
    online="mmlu/default/mmlu",
    split_by="subject",
    balance="subject",
)
