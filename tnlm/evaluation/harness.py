"""The same tasks scored by lm-evaluation-harness: on local rows, or on data that it fetches."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.comparison import digest, figures
from tnlm.evaluation.encoding import window_of
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.results import Evaluation, TaskResult
from tnlm.evaluation.rows import Data, Source, example_rows, rows_of
from tnlm.evaluation.tasks import Row, Scores, Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How lm-eval names what our scores hold, by filter and metric.
_NAMES = {
    ("none", "perplexity"): "loglikelihood",
    ("strict-match", "exact_match"): "exact_match_strict",
    ("flexible-extract", "exact_match"): "exact_match_flexible",
}
_NUMBER = "tnlm_item"


def harness(
    model: PreTrainedModel,
    tasks: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: Data | None = None,
    examples: Mapping[str, Source] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 256,
    seed: int = 1234,
    progress: bool = True,
) -> Evaluation:
    """Let lm-evaluation-harness score a model; the arguments are those of `tnlm.evaluate`.

    With ``data`` it reads those rows and needs no network; without, it fetches its own data.

    Raises:
        OptionError: if lm_eval is not installed.
        EvaluationError: if a task is not in lm-eval, or its data cannot be fetched.
    """
    lm_eval = _lm_eval()
    chosen = [get_task(name) for name in tasks]
    for task in chosen:
        if not task.online:
            hint = "; give data=" if data is None else ""
            raise EvaluationError(f"lm-eval has no task like {task.name}{hint}")
    results = []
    with _quiet(progress), evaluating(model), _random_states(model):
        asked = lm_eval.models.huggingface.HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=window_of(model, tokenizer, max_length),
        )
        for task in chosen:
            shots = task.num_fewshot if num_fewshot is None else num_fewshot
            generates = task.kind == "generation"
            with tempfile.TemporaryDirectory(prefix="tnlm-") as folder:
                configs: list[Any] = [task.online]
                if data is not None:
                    configs = _configs(task, data, examples, folder, limit, shots, max_new_tokens)
                found = lm_eval.tasks.TaskManager(include_defaults=data is None)
                samples = _samples(
                    task,
                    lm_eval,
                    model=asked,
                    tasks=configs,
                    task_manager=found,
                    num_fewshot=shots,
                    limit=limit if data is None else None,
                    gen_kwargs={"max_gen_toks": max_new_tokens} if generates else None,
                    fewshot_random_seed=seed,
                )
            results.append(_result(task, samples, shots, seed))
    return Evaluation(tuple(results), f"lm-eval {lm_eval.__version__}", seed)


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
        found += _configs(task, data, examples, directory, limit, shots, max_new_tokens)
    return found


def _configs(
    task: Task,
    data: Data,
    examples: Mapping[str, Source] | None,
    directory: str | Path,
    limit: int | None,
    shots: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Return one configuration, or one for each part of the task."""
    rows = [{**row, _NUMBER: n} for n, row in enumerate(rows_of(task, data, limit))]
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


def _samples(task: Task, lm_eval: Any, **request: Any) -> list[dict[str, Any]]:
    """Run lm-eval on one task and return what it kept of every item."""
    try:
        found = lm_eval.simple_evaluate(
            **request,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    except OSError as err:
        raise EvaluationError(
            f"{task.name}: lm-eval cannot get its data: {err}; give local rows as data="
        ) from err
    kept = [sample for part in found["samples"].values() for sample in part]
    if all(_NUMBER in sample["doc"] for sample in kept):
        kept.sort(key=lambda sample: sample["doc"][_NUMBER])
    return kept


def _result(task: Task, samples: Sequence[Mapping[str, Any]], shots: int, seed: int) -> TaskResult:
    """Bring lm-eval's samples, one for each item and filter, to scores of items."""
    items: dict[str, Scores] = {}
    for sample in samples:
        key = f"{sample['doc_hash']} {sample['doc_id']} {sample['prompt_hash']}"
        scores = items.setdefault(key, {})
        for metric in sample["metrics"]:
            name = _NAMES.get((sample["filter"], metric), metric)
            scores[name] = float(sample[metric])
    return TaskResult(
        task=task.name,
        n=len(items),
        num_fewshot=shots,
        truncated=0,
        figures=figures(task.metrics, list(items.values()), seed),
        right=task.right,
        items=tuple(items.values()),
        digest=digest(list(items)),
    )


def _lm_eval() -> Any:
    """Import lm-eval, which is optional."""
    try:
        importlib.import_module("lm_eval.models.huggingface")
        importlib.import_module("lm_eval.tasks")
        return importlib.import_module("lm_eval")
    except ImportError as err:
        raise OptionError(
            "without data= the tasks are fetched and scored by lm-eval, which is not installed; "
            "pip install 'tnlm[eval]'"
        ) from err


@contextlib.contextmanager
def _random_states(model: PreTrainedModel) -> Iterator[None]:
    """Give the caller's random states back, of which lm-eval draws names."""
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    plain, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(array)  # noqa: NPY002


@contextlib.contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Keep lm-eval's bars off the screen, unless they are wanted."""
    if progress:
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield
