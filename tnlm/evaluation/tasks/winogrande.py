"""WinoGrande: which of two words a blank stands for."""

from __future__ import annotations

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import ACC, Row, Task, multiple_choice
from tnlm.evaluation.tasks.columns import labelled, plain, text_of, texts_of


def adapt(row: Row) -> Row:
    """Read the plain columns, or ``sentence``, ``option1``, ``option2`` and ``answer``."""
    if "query" in row:
        found = plain(row)
    else:
        options = texts_of({"options": [row["option1"], row["option2"]]}, "options")
        gold = labelled(row["answer"], ["1", "2"], options)
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


TASK = Task(
    name="winogrande",
    source="Sakaguchi et al., arXiv 1907.10641, partial scoring of Trinh and Le, arXiv 1806.02847; "
    "lm-eval winogrande 1.0",
    metrics=(ACC,),
    adapt=adapt,
    config=multiple_choice("gold", doc_to_target=rest, doc_to_choice=filled),
    online="winogrande/winogrande",
)
