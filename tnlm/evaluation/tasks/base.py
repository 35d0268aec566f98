"""What a task is: rows, the lm-evaluation-harness configuration that reads them, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Scores = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What a model makes of one continuation.

    Attributes:
        loglikelihood: of the continuation after its context, in nats.
        tokens: number of tokens in the continuation.
    """

    loglikelihood: float
    tokens: int = 1


@dataclass(frozen=True)
class TaskMetric:
    """How the scores of all items become one figure.

    Attributes:
        name: of the figure; without ``aggregate`` also of the score that it is the mean of.
        higher_is_better: None where neither is, as for a preference that should be a half.
        aggregate: computes the figure from the scores of the items, or returns None where they do
            not suffice; without it, the figure is the mean over the items that have the score.
    """

    name: str
    higher_is_better: bool | None = True
    aggregate: Callable[[Sequence[Scores]], float | None] | None = None


ACC = TaskMetric("acc")
ACC_NORM = TaskMetric("acc_norm")


@dataclass(frozen=True)
class Task:
    """A benchmark as data and small functions.

    Attributes:
        name: what users write; lm-evaluation-harness' own name where it has the task.
        source: paper and protocol.
        metrics: figures that are reported.
        adapt: maps a row of any accepted layout to the columns that ``config`` reads, and raises
            EvaluationError for a row that cannot be asked.
        config: the lm-evaluation-harness configuration that reads adapted rows: prompt, choices,
            target. It is empty for a task that measures the perplexity of a text.
        score: computes the scores of an item from its adapted row and the answers to its choices;
            None leaves that to lm-eval.
        file: the beginning of the names of the task's data files; the task's name if empty.
        online: folder and name of the task in lm-eval, which fetches its data where none is given;
            empty if lm-eval does not have the task.
        num_fewshot: examples before an item unless the user says otherwise.
        split_by: column whose values are separate tasks in lm-eval, e.g. MMLU's subject.
        balance: column whose values share a limit evenly, as both parts of WinoBias must.
        right: the score, 0 or 1, that says whether an item was answered; empty if there is none.

    Example:
        >>> Task("mine", "none", (ACC,), adapt=dict, config=multiple_choice("query")).right
        'acc'
    """

    name: str
    source: str
    metrics: tuple[TaskMetric, ...]
    adapt: Callable[[Row], Row]
    config: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[Row, Sequence[Answer]], Scores] | None = None
    file: str = ""
    online: str = ""
    num_fewshot: int = 0
    split_by: str = ""
    balance: str = ""
    right: str = "acc"


def multiple_choice(prompt: str, **more: Any) -> dict[str, Any]:
    """Return the configuration that compares the likelihoods of each row's ``choices``.

    Args:
        prompt: a column, or a Jinja template of the text before the choices.
        more: further keys of an lm-eval configuration, or other values for those set here.

    Example:
        >>> multiple_choice("Q: {{query}}")["doc_to_choice"]
        'choices'
    """
    return {
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        **more,
    }
