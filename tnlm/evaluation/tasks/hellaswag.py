"""HellaSwag: the most plausible continuation of a description."""

from __future__ import annotations

import re

from tnlm.evaluation.tasks.base import ACC, ACC_NORM, Row, Task, multiple_choice
from tnlm.evaluation.tasks.columns import gold_of, plain, text_of, texts_of


def clean(text: str) -> str:
    """Remove WikiHow's markup from a text, as lm-eval does.

    Example:
        >>> clean("Cut it. [substeps] Then  fold [title] Iron it")
        'Cut it. Then fold. Iron it'
    """
    text = text.strip().replace(" [title]", ". ")
    return re.sub("\\[.*?\\]", "", text).replace("  ", " ")


def adapt(row: Row) -> Row:
    """Read the plain columns, or those of the published data set.

    The latter are ``activity_label``, ``ctx_a``, ``ctx_b``, ``endings`` and ``label``.
    """
    if "query" in row:
        return plain(row)
    cleaned = [clean(ending) for ending in texts_of(row, "endings")]
    endings = texts_of({"endings": cleaned}, "endings")
    context = f"{text_of(row, 'ctx_a')} {text_of(row, 'ctx_b').capitalize()}"
    return {
        "query": clean(f"{text_of(row, 'activity_label')}: {context}"),
        "choices": endings,
        "gold": gold_of(row["label"], endings),
    }


TASK = Task(
    name="hellaswag",
    source="Zellers et al., arXiv 1905.07830; lm-eval hellaswag 1.0",
    metrics=(ACC, ACC_NORM),
    adapt=adapt,
    config=multiple_choice("query"),
    online="hellaswag/hellaswag",
)
