"""The same tasks scored by lm-evaluation-harness: on local rows, or on data that it fetches."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tnlm.checkpoint.claim import temporary_folder
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.comparison import digest, figures
from tnlm.evaluation.encoding import window_of
from tnlm.evaluation.harness_tasks import NUMBER, configs
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.results import Evaluation, TaskResult
from tnlm.evaluation.rows import Data, Source
from tnlm.evaluation.tasks import Scores, Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# How lm-eval names what our scores hold, by filter and metric.
_NAMES = {
    ("none", "perplexity"): "loglikelihood",
    ("strict-match", "exact_match"): "exact_match_strict",
    ("flexible-extract", "exact_match"): "exact_match_flexible",
}


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

    Returns:
        Figures and the scores of every item; lm-eval does not say how many prompts were cut.

    Raises:
        OptionError: if lm_eval is not installed.
        EvaluationError: if a task is not in lm-eval, or its data cannot be fetched.
    """
    if examples is not None and data is None:
        raise OptionError("examples= needs data=; without it lm-eval draws its own")
    chosen = [get_task(name) for name in tasks]
    for task in chosen:
        if not task.online:
            hint = "; give data=" if data is None else ""
            raise EvaluationError(f"lm-eval has no task like {task.name}{hint}")
    lm_eval, results = _lm_eval(), []
    with _quiet(progress), evaluating(model), _random_states(model):
        asked = lm_eval.models.huggingface.HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=window_of(model, tokenizer, max_length),
        )
        known = lm_eval.tasks.TaskManager(include_defaults=data is None)
        for task in chosen:
            shots = task.num_fewshot if num_fewshot is None else num_fewshot
            request = {
                "model": asked,
                "task_manager": known,
                "num_fewshot": shots,
                "fewshot_random_seed": seed,
                "limit": limit if data is None else None,
            }
            if task.kind == "generation":
                request["gen_kwargs"] = {"max_gen_toks": max_new_tokens}
            with temporary_folder() as folder:
                request["tasks"] = [task.online]
                if data is not None:
                    request["tasks"] = configs(
                        task, data, examples, folder, limit, shots, max_new_tokens
                    )
                samples = _samples(task, lm_eval, request)
            results.append(_result(task, samples, shots, seed))
    return Evaluation(tuple(results), f"lm-eval {lm_eval.__version__}", seed)


def _samples(task: Task, lm_eval: Any, request: Mapping[str, Any]) -> list[dict[str, Any]]:
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
    if all(NUMBER in sample["doc"] for sample in kept):
        kept.sort(key=lambda sample: sample["doc"][NUMBER])
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
        truncated=None,
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
