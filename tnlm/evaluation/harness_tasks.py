"""Local rows as files and configurations for lm-evaluation-harness."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnlm.errors import EvaluationError
from tnlm.evaluation.rows import Data, Source, example_rows, rows_of
from tnlm.evaluation.tasks import Row, Task, get_task

NUMBER = "tnlm_item"  # the column that says where an item stands among all


def lm_eval_tasks(
    tasks: Sequence[str],
    data: Data,
    directory: str | Path,
    *,
    examples: Mapping[str, Source] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int = 256,
) -> list[dict[str, Any]]:
    """Write local rows as files that lm-eval reads, and return its configurations of the tasks.

    They are what ``lm_eval.simple_evaluate(tasks=...)`` takes, and need no network. A task that
    lm-eval keeps apart by subject, as MMLU, gives one for each.

    Args:
        tasks: names of tasks that lm-eval has too.
        data: as for `tnlm.evaluate`.
        directory: where the files go.
        examples: as for `tnlm.evaluate`.
        limit: items of each task, from the first.
        num_fewshot: examples before each item; None is the task's own number.
        max_new_tokens: most tokens of a generated answer.

    Example:
        >>> import tempfile
        >>> rows = [{"query": "2 + 2 =", "choices": ["4", "5"], "gold": 0}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [config] = lm_eval_tasks(["piqa"], {"piqa": rows}, folder)
        >>> config["dataset_path"], config["doc_to_choice"]
        ('json', 'choices')
    """
    found = []
    for task in map(get_task, tasks):
        if not task.online:
            raise EvaluationError(f"lm-eval has no task like {task.name}")
        shots = task.num_fewshot if num_fewshot is None else num_fewshot
        found += configs(task, data, examples, directory, limit, shots, max_new_tokens)
    return found


def configs(
    task: Task,
    data: Data,
    examples: Mapping[str, Source] | None,
    directory: str | Path,
    limit: int | None,
    shots: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Write one task's rows and return one configuration, or one for each part of the task.

    The arguments are those of :func:`lm_eval_tasks`, with the number of examples settled.
    """
    rows = [{**row, NUMBER: n} for n, row in enumerate(rows_of(task, data, limit))]
    pool = example_rows(task, data, examples) if shots else []
    if pool is None:
        raise EvaluationError(f"{task.name}: num_fewshot={shots}, but there are no example rows")
    parts = dict.fromkeys(row[task.split_by] if task.split_by else "" for row in rows)
    found = []
    for part in parts:
        name = f"{task.name}_{part}" if part else task.name
        splits = {"test": _part(task, rows, part), "train": _part(task, pool, part)}
        files = {
            split: _write(Path(directory), f"{name}_{split}", r) for split, r in splits.items() if r
        }
        found.append(_config(task, name, files, Path(directory), max_new_tokens))
    return found


def _config(
    task: Task, name: str, files: Mapping[str, str], directory: Path, max_new_tokens: int
) -> dict[str, Any]:
    """Return lm-eval's configuration of a task that reads these files."""
    scored = [metric.name for metric in task.metrics if metric.aggregate is None]
    config: dict[str, Any] = {
        "task": f"tnlm_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": dict(files), "cache_dir": str(directory / "cache")},
        "test_split": "test",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in scored
        ],
        **copy.deepcopy(dict(task.harness)),
    }
    if "train" in files:
        config["fewshot_split"] = "train"
        sampler = "first_n" if task.sampler == "first" else "default"
        config["fewshot_config"] = {"sampler": sampler}
    if task.kind == "generation":
        config["generation_kwargs"] = {
            "until": list(task.until),
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": max_new_tokens,
        }
    return config


def _part(task: Task, rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if not part or row[task.split_by] == part]


def _write(directory: Path, name: str, rows: Sequence[Row]) -> str:
    """Write rows to a JSONL file and return its path."""
    path = directory.absolute() / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
