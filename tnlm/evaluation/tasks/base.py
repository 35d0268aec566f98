"""What a task is: rows become items, and a model's answers become scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tnlm.errors import EvaluationError

Row = Mapping[str, Any]
Scores = dict[str, float]


@dataclass(frozen=True)
class Item:
    """One question in the words that the model is asked.

    Attributes:
        pairs: contexts and continuations whose likelihood is asked for; the continuation is empty
            where text is generated.
        gold: number of the right pair.
        choices: what the lengths of the continuations are measured by, for ``acc_norm``.
        shot: the item with its answer, as it stands among the examples of other items.
        labels: a number for each pair, where a task scores more than one right answer.
        answer: the text that a generated one is compared with.
        group: the part of the data that the item belongs to.
        description: what stands before all examples.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    choices: tuple[str, ...] = ()
    shot: str = ""
    labels: tuple[int, ...] = ()
    answer: str = ""
    group: str = ""
    description: str = ""


@dataclass(frozen=True)
class Answer:
    """What a model made of one pair.

    Attributes:
        loglikelihood: of the continuation after the context, in nats.
        greedy: whether greedy decoding gives the continuation.
        tokens: tokens of the continuation.
        text: generated text, where that was asked for.
    """

    loglikelihood: float = 0.0
    greedy: bool = False
    tokens: int = 0
    text: str = ""


@dataclass(frozen=True)
class Metric:
    """A figure over all items.

    Attributes:
        name: of the figure; without ``aggregate`` also of the score that it is the mean of.
        higher_is_better: None where neither is, as for a preference that should be a half.
        aggregate: makes the figure from the scores of the items, or None where they do not
            suffice; without it, it is the mean over the items that have the score.
    """

    name: str
    higher_is_better: bool | None = True
    aggregate: Callable[[Sequence[Scores]], float | None] | None = None


ACC = Metric("acc")
ACC_NORM = Metric("acc_norm")


@dataclass(frozen=True)
class Task:
    """A benchmark as data and small functions.

    Attributes:
        name: what users write; lm-evaluation-harness' own name where it has the task.
        source: paper and protocol.
        metrics: figures that are reported.
        adapt: maps a row of any accepted layout to the columns that ``item`` reads.
        item: makes the item of an adapted row.
        score: makes the scores of one item from its answers.
        kind: whether the task asks for likelihoods, generated text or the loss of a text.
        file: how the names of its data files begin; the task's name if empty.
        online: lm-eval's name of the task; empty if it has none.
        harness: the part of lm-eval's configuration that reads adapted rows.
        num_fewshot: examples before an item unless the user says otherwise.
        sampler: how examples are drawn, ``"random"`` or the ``"first"`` of the item's group.
        split_by: column by which lm-eval keeps tasks apart, e.g. MMLU's subject.
        balance: column whose values share a limit evenly, as both parts of WinoBias must.
        right: the score, 0 or 1, that says whether an item was answered; empty if there is none.
        until: texts at which generation stops.
    """

    name: str
    source: str
    metrics: tuple[Metric, ...]
    adapt: Callable[[Row], Row]
    item: Callable[[Row], Item]
    score: Callable[[Item, Sequence[Answer]], Scores]
    kind: Literal["likelihood", "generation", "text"] = "likelihood"
    file: str = ""
    online: str = ""
    harness: Mapping[str, Any] = field(default_factory=dict)
    num_fewshot: int = 0
    sampler: Literal["random", "first"] = "random"
    split_by: str = ""
    balance: str = ""
    right: str = "acc"
    until: tuple[str, ...] = ()


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
    """Return answers with their labels, without the empty ones that a split at ``;`` leaves.

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
    """Return the number of the right choice, or raise if the row does not say it.

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
    """Return the number of the choice that carries the label, as ``"B"`` in ARC."""
    if value is None or value == "":
        raise EvaluationError("no gold answer; leave out rows without one")
    if str(value).strip() not in labels:
        raise EvaluationError(f"gold answer {value!r}, but the choices are {list(labels)}")
    return gold_of(list(labels).index(str(value).strip()), choices)


def plain(row: Row) -> Row:
    """Return the columns ``query``, ``choices`` and ``gold``, checked."""
    choices = texts_of(row, "choices")
    gold = gold_of(row["gold"], choices)
    return {"query": text_of(row, "query"), "choices": choices, "gold": gold}


def choose(prompt: str, row: Row, *, description: str = "") -> Item:
    """Make the item that asks for the likelihood of each choice after one prompt."""
    choices, gold = tuple(row["choices"]), row["gold"]
    return Item(
        pairs=tuple((prompt, f" {choice}") for choice in choices),
        gold=gold,
        choices=choices,
        shot=f"{prompt} {choices[gold]}",
        description=description,
    )


def accuracy(item: Item, answers: Sequence[Answer]) -> Scores:
    """Score a choice by likelihood; ``acc_norm`` divides it by the length of the choice.

    lm-eval's ``acc_norm`` counts characters, of the choice without the space before it. For
    text in ASCII, characters are bytes.
    """
    values = [answer.loglikelihood for answer in answers]
    normed = [value / len(text) for value, text in zip(values, item.choices, strict=True)]
    return {"acc": float(best(values) == item.gold), "acc_norm": float(best(normed) == item.gold)}


def best(values: Sequence[float]) -> int:
    """Return the number of the largest value, the first of equal ones.

    Example:
        >>> best([1.0, 3.0, 3.0])
        1
    """
    return max(range(len(values)), key=values.__getitem__)
