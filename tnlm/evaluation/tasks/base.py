"""The class of tasks: rows, the lm-evaluation-harness configuration for them, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = Mapping[str, Any]
Scores = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """A model's score of one continuation.

    Attributes:
        loglikelihood: log-likelihood of the continuation after its context, in nats.
        tokens: number of tokens in the continuation.
    """

    loglikelihood: float
    tokens: int = 1


@dataclass(frozen=True)
class TaskMetric:
    """A figure computed from the scores of all items.

    Attributes:
        name: name of the figure; without ``aggregate``, also of the score that is averaged.
        higher_is_better: None if neither direction is, as for a preference whose ideal is 0.5.
        aggregate: computes the figure from the items' scores, or returns None if they are not
            sufficient; without it, the figure is the mean over the items that have the score.
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
        name: the name that users write; that of lm-evaluation-harness if it has the task.
        source: paper and protocol.
        metrics: the figures to report.
        adapt: converts a row of any accepted layout to the columns that ``config`` reads, and
            raises EvaluationError for an invalid row.
        config: the lm-evaluation-harness configuration that reads converted rows: prompt, choices,
            target; empty for a task that measures the perplexity of a text.
        score: computes the scores of an item from its converted row and the answers to its
            choices; if None, lm-eval computes them.
        file: prefix of the names of the task's data files; the task's name if empty.
        online: folder and name of the task in lm-eval, which downloads its data if none is given;
            empty if lm-eval does not have the task.
        num_fewshot: default number of examples for each item.
        split_by: column whose values are separate tasks in lm-eval, e.g. MMLU's subject.
        balance: column whose values must share a limit evenly, as the parts of WinoBias.
        right: the score, 0 or 1, that shows whether an item is answered correctly; empty if none.

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
    """Return a configuration that compares the likelihoods of each row's ``choices``.

    Args:
        prompt: a column, or a Jinja template of the text before the choices.
        more: further keys of an lm-eval configuration; they override those set here.

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
