"""Benchmarks scored by lm-evaluation-harness, on local rows or on data that it downloads."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import random
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.comparison import digest, figures
from tnlm.evaluation.local_tasks import NUMBER
from tnlm.evaluation.mode import evaluating, room_of
from tnlm.evaluation.results import TaskResult
from tnlm.evaluation.tasks import Answer, Scores, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tnlm.evaluation.protocol import Protocol

# Names of our scores, by lm-eval's filter and metric.
_NAMES = {
    ("none", "perplexity"): "loglikelihood",
    ("strict-match", "exact_match"): "exact_match_strict",
    ("flexible-extract", "exact_match"): "exact_match_flexible",
}


def scorer() -> str:
    """Import lm-eval, an optional dependency, and return its name and version.

    Raises:
        OptionError: if it is not installed.
    """
    try:
        return f"lm-eval {importlib.import_module('lm_eval').__version__}"
    except ImportError as err:
        raise OptionError(
            "benchmarks are scored by lm-evaluation-harness, which is not installed; "
            "pip install 'tnlm[eval]'"
        ) from err


def scored(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    local: Sequence[Mapping[str, Any]] | None,
    asked: Protocol,
) -> TaskResult:
    """Score one task with lm-evaluation-harness.

    Args:
        model: a causal language model, left unchanged.
        task: a benchmark.
        tokenizer: the model's tokenizer.
        local: configurations of the task on local rows; if None, lm-eval downloads its data.
        asked: the protocol.

    Raises:
        EvaluationError: if an item, which is named, cannot be scored, or the download fails.
    """
    shots = asked.shots_of(task)
    with _quiet(asked.progress), evaluating(model), _random_states(model):
        harness_model = importlib.import_module("tnlm.evaluation.harness_model")
        lm = harness_model.HarnessModel(
            model, tokenizer, task.name, asked.batch_size, asked.max_length or room_of(model)
        )
        loaded = _fetched(task, shots, asked) if local is None else _load(list(local))
        for each in loaded["tasks"].values():
            each.set_fewshot_seed(asked.seed)
        found = _run(lm, loaded, task, asked.limit if local is None else None)
    samples, skipped = _without(list(lm.too_long), _by_item(found["samples"]))
    if not samples:
        raise EvaluationError(
            f"{task.name}: every item has a choice longer than the window of {lm.max_length} "
            "tokens; use a longer window"
        )
    scores = [_scores(task, each, None if local is None else lm.tokens) for each in samples]
    return TaskResult(
        task=task.name,
        n=len(scores),
        num_fewshot=shots,
        truncated=lm.truncated,
        figures=figures(task.metrics, scores, asked.seed),
        right=task.right,
        items=tuple(scores),
        digest=digest([[each[0]["arguments"], each[0]["target"]] for each in samples]),
        skipped=skipped,
    )


def _load(specs: Sequence[Any], folder: Path | None = None) -> dict[str, Any]:
    """Load tasks by configuration, or by name from a folder."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    loaded: dict[str, Any] = manager(include_defaults=False, include_path=folder).load(specs)
    return loaded


def _run(lm: Any, loaded: dict[str, Any], task: Task, limit: int | None) -> dict[str, Any]:
    """Run the tasks, and return lm-eval's result."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    try:
        found: dict[str, Any] = evaluator.evaluate(lm, loaded, limit=limit, bootstrap_iters=0)
    except OverflowError as err:
        raise EvaluationError(
            f"{task.name}: the model's losses are too large for lm-eval to sum up: {err}"
        ) from err
    return found


def _fetched(task: Task, shots: int, asked: Protocol) -> dict[str, Any]:
    """Load lm-eval's own task with its data."""
    folder, _, name = task.online.rpartition("/")
    home = Path(str(importlib.import_module("lm_eval.tasks").__file__)).parent
    try:
        loaded = _load([name], home / folder)
    except (OSError, RuntimeError, ValueError) as err:
        raise EvaluationError(
            f"{task.name}: lm-eval cannot get its data: {err}; give local rows as data=",
            argument="data",
        ) from err
    for each in loaded["tasks"].values():
        each.set_config("num_fewshot", shots)
        if each.OUTPUT_TYPE == "generate_until":
            limit = {"max_gen_toks": asked.max_new_tokens}
            each.set_config("generation_kwargs", limit, update=True)
    return loaded


def _by_item(samples: Mapping[str, Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Group lm-eval's samples, one for each filter, by item, in order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for number, (part, kept) in enumerate(samples.items()):
        for sample in kept:
            place = sample["doc"].get(NUMBER)
            key = (number, part, sample["doc_id"]) if place is None else (place,)
            found.setdefault(key, []).append(sample)
    return [found[key] for key in sorted(found)]


def _without(
    too_long: Container[Any], items: Sequence[list[dict[str, Any]]]
) -> tuple[list[list[dict[str, Any]]], tuple[int, ...]]:
    """Return the items whose choices all fit the window, and the positions of the others."""
    skipped = tuple(
        number
        for number, samples in enumerate(items)
        if any(tuple(pair) in too_long for pair in samples[0]["arguments"])
    )
    return [each for number, each in enumerate(items) if number not in skipped], skipped


def _scores(
    task: Task, samples: Sequence[Mapping[str, Any]], tokens: Mapping[Any, int] | None
) -> Scores:
    """Return the scores of one item: lm-eval's, or for local rows the task's own."""
    if task.score and tokens is not None:
        [sample] = samples
        likelihoods = [value for value, _ in sample["filtered_resps"]]
        pairs = zip(likelihoods, sample["arguments"], strict=True)
        answers = [Answer(value, tokens[tuple(pair)]) for value, pair in pairs]
        return task.score(sample["doc"], answers)
    return {
        _NAMES.get((sample["filter"], metric), metric): float(sample[metric])
        for sample in samples
        for metric in sample["metrics"]
    }


@contextlib.contextmanager
def _random_states(model: PreTrainedModel) -> Iterator[None]:
    """Restore the caller's random states, since lm-eval draws from them."""
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
    """Hide lm-eval's log, and its progress bars unless they are wanted."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    hidden = contextlib.nullcontext() if progress else contextlib.redirect_stderr(io.StringIO())
    try:
        with hidden:
            yield
    finally:
        logger.setLevel(level)
