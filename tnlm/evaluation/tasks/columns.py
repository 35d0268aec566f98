"""Reads and checks columns of rows; errors say what is wrong and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import Row


def text_of(row: Row, column: str) -> str:
    """Return a column that must be text.

    Example:
        >>> text_of({"query": "2 + 2"}, "query")
        '2 + 2'
    """
    value = row[column]
    if not isinstance(value, str):
        raise EvaluationError(f"{column} must be text, got {value!r}")
    return value


def texts_of(row: Row, column: str) -> list[str]:
    """Return a column that must be a list of texts, none of them empty."""
    values = row[column]
    if (
        not isinstance(values, list | tuple)
        or not values
        or not all(isinstance(value, str) and value for value in values)
    ):
        raise EvaluationError(f"{column} must be a list of texts, none empty, got {values!r}")
    return list(values)


def answers_of(row: Row, column: str, labels: Sequence[int]) -> tuple[list[str], list[int]]:
    """Return answers with their labels, without empty answers, which a split at ``;`` leaves.

    Example:
        >>> answers_of({"choices": ["yes", "", "no"]}, "choices", [1, 0, 0])
        (['yes', 'no'], [1, 0])
    """
    values = row[column]
    if not isinstance(values, list | tuple) or len(values) != len(labels):
        raise EvaluationError(
            f"{column} must list as many texts as there are labels, got {values!r}"
        )
    kept = [(text, label) for text, label in zip(values, labels, strict=True) if text != ""]
    return texts_of({column: [text for text, _ in kept]}, column), [label for _, label in kept]


def gold_of(value: Any, choices: Sequence[str]) -> int:
    """Return the index of the right choice; raise `EvaluationError` if the row has none.

    Example:
        >>> gold_of("1", ["yes", "no"])
        1
    """
    if value is None or value == "" or value == -1:
        raise EvaluationError("no gold answer; leave out rows without one")
    known = isinstance(value, int) and not isinstance(value, bool)
    gold = int(value) if known or (isinstance(value, str) and value.isdecimal()) else -1
    if not 0 <= gold < len(choices):
        raise EvaluationError(f"gold answer {value!r}, but there are {len(choices)} choices")
    return gold


def labelled(value: Any, labels: Sequence[str], choices: Sequence[str]) -> int:
    """Return the index of the choice with a label, such as ``"B"`` in ARC."""
    if value is None or value == "":
        raise EvaluationError("no gold answer; leave out rows without one")
    if str(value).strip() not in labels:
        raise EvaluationError(f"gold answer {value!r}, but the choices are {list(labels)}")
    return gold_of(list(labels).index(str(value).strip()), choices)


def plain(row: Row) -> Row:
    """Check the columns ``query``, ``choices`` and ``gold``, and return them."""
    choices = texts_of(row, "choices")
    gold = gold_of(row["gold"], choices)
    return {"query": text_of(row, "query"), "choices": choices, "gold": gold}
