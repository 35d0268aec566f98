"""WinoGrande: which of two words a blank stands for."""

from __future__ import annotations

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import (
    ACC,
    Item,
    Row,
    Task,
    accuracy,
    gold_of,
    labelled,
    plain,
    text_of,
)


def adapt(row: Row) -> Row:
    """Read the plain columns, or ``sentence``, ``option1``, ``option2`` and ``answer``."""
    if "query" in row:
        found = plain(row)
    else:
        options = [text_of(row, "option1"), text_of(row, "option2")]
        gold = labelled(row["answer"], ["1", "2"], options)
        gold = gold_of(gold, options)
        found = {"query": text_of(row, "sentence"), "choices": options, "gold": gold}
    if "_" not in found["query"]:
        raise EvaluationError(f"no blank _ in {found['query']!r}")
    return found


def filled(row: Row) -> list[str]:
    """Return the beginning of the sentence with each word in the blank."""
    before = row["query"].split("_", 1)[0]
    return [before + choice for choice in row["choices"]]


def rest(row: Row) -> str:
    """Return what follows the blank, which is what is scored."""
    return str(row["query"].split("_", 1)[1].strip())


def item(row: Row) -> Item:
    """Score the rest of the sentence after each word (partial scoring)."""
    after, beginnings = rest(row), filled(row)
    return Item(
        pairs=tuple((beginning, f" {after}") for beginning in beginnings),
        gold=row["gold"],
        choices=tuple(beginnings),
        shot=f"{beginnings[row['gold']]} {after}",
    )


TASK = Task(
    name="winogrande",
    source="Sakaguchi et al., arXiv 1907.10641, partial scoring of Trinh and Le, arXiv 1806.02847; "
    "lm-eval winogrande 1.0",
    metrics=(ACC,),
    adapt=adapt,
    item=item,
    score=accuracy,
    online="winogrande",
    harness={
        "output_type": "multiple_choice",
        "doc_to_text": "gold",
        "doc_to_target": rest,
        "doc_to_choice": filled,
    },
)
