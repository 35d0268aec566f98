"""Local rows as tasks of lm-evaluation-harness, which reads them from memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tnlm.errors import EvaluationError
from tnlm.evaluation.rows import Source, Sources, example_rows, rows_of
from tnlm.evaluation.tasks import Row, Task, get_task

NUMBER = "tnlm_item"
"""The column with the index of the item, from 0."""


def lm_eval_tasks(
    tasks: Sequence[str],
    data: Sources,
    *,
    examples: Mapping[str, Source] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Return configurations of tasks on local rows, for your own runs of lm-evaluation-harness.

    Pass them to ``lm_eval.simple_evaluate(tasks=...)``; they need no network. A task that lm-eval
    splits by subject, such as MMLU, gives one configuration per subject.

    Args:
        tasks: names from :func:`tnlm.evaluation.list_tasks`.
        data: as for `tnlm.evaluate`.
        examples: as for `tnlm.evaluate`.
        limit: items per task, from the first.
        num_fewshot: examples for each item; None for the task's default.
        max_new_tokens: most tokens of a generated answer.

    Raises:
        OptionError: if a task is unknown.
        EvaluationError: if a task is not a benchmark, or rows are missing or invalid.

    Example:
        >>> rows = [{"query": "2 + 2 =", "choices": ["4", "5"], "gold": 0}]
        >>> [config] = lm_eval_tasks(["piqa"], {"piqa": rows})
        >>> config["task"], config["doc_to_choice"]
        ('piqa', 'choices')
    """
    found = []
    for task in map(get_task, tasks):
        if not task.config:
            raise EvaluationError(f"{task.name} is measured by tnlm.perplexity, not by lm-eval")
        shots = task.num_fewshot if num_fewshot is None else num_fewshot
        found += configs(task, data, examples, limit, shots, max_new_tokens)
    return found


def configs(
    task: Task,
    data: Sources,
    examples: Mapping[str, Source] | None,
    limit: int | None,
    shots: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Return one configuration of a task, or one for each of its parts.

    The arguments are those of :func:`lm_eval_tasks`, with a definite number of examples.
    """
    rows = [{**row, NUMBER: n} for n, row in enumerate(rows_of(task, data, limit))]
    pool = example_rows(task, rows, shots, data, examples)
    parts = dict.fromkeys(row.get(task.split_by, "") for row in rows)
    return [
        _config(
            task,
            f"{task.name}_{part}" if part else task.name,
            [row for row in rows if row.get(task.split_by, "") == part],
            [row for row in pool if row.get(task.split_by, "") == part],
            shots,
            max_new_tokens,
        )
        for part in parts
    ]


def _config(
    task: Task,
    name: str,
    rows: Sequence[Row],
    pool: Sequence[Row],
    shots: int,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Return lm-eval's configuration of a task with these rows and examples."""
    metrics = ["acc"] if task.score else [m.name for m in task.metrics]
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": _dataset(rows, pool),
        "test_split": "test",
        "num_fewshot": shots,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
        **copy.deepcopy(dict(task.config)),
    }
    if pool:
        config["fewshot_split"] = "train"
    if "generation_kwargs" in config:
        config["generation_kwargs"]["max_gen_toks"] = max_new_tokens
    return config


def _dataset(rows: Sequence[Row], pool: Sequence[Row]) -> Callable[..., dict[str, Any]]:
    """Return the function from which lm-eval loads the rows."""

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        splits = {"test": rows, "train": pool}
        return {name: Dataset.from_list(list(part)) for name, part in splits.items() if part}

    return load
