"""evaluate: runs benchmarks through lm-evaluation-harness, and measures perplexity of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnlm.calibration.text import AUTO
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.comparison import compared
from tnlm.evaluation.harness import scored, scorer
from tnlm.evaluation.local_tasks import configs
from tnlm.evaluation.mode import check_causal, check_positions
from tnlm.evaluation.protocol import Protocol
from tnlm.evaluation.results import Evaluation
from tnlm.evaluation.rows import Source, Sources, text_source
from tnlm.evaluation.tasks import Task, get_task
from tnlm.evaluation.tasks.perplexity import TASK as PERPLEXITY
from tnlm.evaluation.text import measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Read = dict[str, Any]
"""The input of each task: a text, configurations of local rows, or None for lm-eval's data."""


def evaluate(
    model: PreTrainedModel,
    tasks: str | Sequence[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | None = None,
    data: Sources | None = None,
    examples: Mapping[str, Source] | None = None,
    baseline: PreTrainedModel | Evaluation | None = None,
    window: int = 512,
    windows: int = 16,
    bos: bool | str = AUTO,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 256,
    seed: int = 1234,
    progress: bool = True,
) -> Evaluation:
    """Measure perplexity on a text, benchmarks, or both, with standard errors.

    Benchmarks are scored by lm-evaluation-harness: with ``data``, on local rows and without a
    network; without ``data``, on data that it downloads.

    Args:
        model: a causal language model, left unchanged.
        tasks: names from :func:`tnlm.evaluation.list_tasks`.
        tokenizer: the model's tokenizer.
        text: a text or the path of one, for perplexity as in :func:`tnlm.perplexity`.
        data: a directory of JSONL files, or a file or rows for each task's name.
        examples: a file or rows for each task's name, from which few-shot examples are drawn; a
            directory given as ``data`` may hold them as ``<task>_train.jsonl``.
        baseline: a model to compare with, which uses the same tokenizer, or an earlier evaluation
            of the same questions.
        window: tokens per window of the text.
        windows: number of windows, from the start of the text.
        bos: whether every window starts with BOS, see :func:`tnlm.perplexity`.
        limit: items per benchmark, from the first; for MMLU and WinoBias, the first of each part
            in turn. Without ``data``, lm-eval applies it to each subject of MMLU separately.
        num_fewshot: examples for each item; None for the task's default.
        batch_size: sequences per pass.
        max_length: most tokens of a prompt; longer prompts lose their first tokens, and the result
            counts how many. Items with a choice that is longer still are skipped and counted. None
            for the model's number of positions.
        max_new_tokens: most tokens of a generated answer.
        seed: seed of the few-shot draws and bootstraps.
        progress: show progress bars.

    Returns:
        The figures, the scores of every item, and the answers that differ from the baseline's.

    Raises:
        OptionError: if a task or option is unknown, or a package is missing.
        EvaluationError: if an item, which is named, is invalid or has no finite score.

    Source:
        Tasks, prompts and scores: lm-evaluation-harness 0.4.13, except StereoSet and WinoBias.
        Paired errors: Miller, "Adding error bars to evals", arXiv 2411.00640. Flips: Dutta et al.,
        "Accuracy is not all you need", arXiv 2407.09141.

    Example:
        >>> evaluate(None, "piqa", tokenizer=None, limit=0)
        Traceback (most recent call last):
        tnlm.errors.OptionError: limit=0, but at least 1 is needed
    """
    asked = Protocol(
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        window=window,
        windows=windows,
        bos=bos,
        seed=seed,
        progress=progress,
    )
    chosen = _chosen(tasks, text)
    _check(model, chosen, tokenizer, asked, text=text, data=data, examples=examples)
    read = {task.name: _read(task, text, data, examples, asked) for task in chosen}
    by = scorer() if any(task.config for task in chosen) else "tnlm"
    if isinstance(baseline, Evaluation):
        _check_baseline(baseline, chosen, by)
    found = _evaluate(model, chosen, tokenizer, read, asked, by)
    if baseline is None:
        return found
    before = (
        baseline
        if isinstance(baseline, Evaluation)
        else _evaluate(baseline, chosen, tokenizer, read, asked, by)
    )
    pairs = zip(found.results, chosen, strict=True)
    results = tuple(compared(result, before, task.metrics, seed) for result, task in pairs)
    return Evaluation(results, by, seed, found.perplexity)


def _chosen(tasks: str | Sequence[str] | None, text: str | Path | None) -> list[Task]:
    """Return the tasks to run; a text adds its perplexity as the first."""
    names = [tasks] if isinstance(tasks, str) else list(tasks or ())
    if text is not None and PERPLEXITY.name not in names:
        names.insert(0, PERPLEXITY.name)
    if not names:
        raise OptionError("nothing to measure; pass tasks= or text=", argument=("tasks", "text"))
    if len(set(names)) < len(names):
        raise OptionError(f"tasks={names}; name each once", argument="tasks")
    return [get_task(name) for name in names]


def _check(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase | None,
    asked: Protocol,
    **sources: Any,
) -> None:
    """Raise an error for options that are invalid, or have no effect."""
    if tokenizer is None:
        raise EvaluationError("an evaluation needs the model's tokenizer, got None")
    check_causal(model, "an evaluation")
    if asked.max_length is not None:
        check_positions(model, asked.max_length, f"max_length={asked.max_length}", "max_length")
    if sources["examples"] is not None and sources["data"] is None:
        raise OptionError(
            "examples= needs data=; without it, lm-eval draws its own", argument="data"
        )
    if not any(task.config for task in tasks):
        unused = {name: getattr(asked, name) for name in ("limit", "num_fewshot", "max_length")}
        unused |= {} if sources["text"] is None else sources | {"text": None}
        for name, value in unused.items():
            if value is not None:
                raise OptionError(
                    f"{name}= has no effect on a text; pass tasks= or leave it out",
                    argument=(name, "tasks"),
                )


def _read(
    task: Task,
    text: str | Path | None,
    data: Sources | None,
    examples: Mapping[str, Source] | None,
    asked: Protocol,
) -> Any:
    """Return the checked input of a task."""
    if not task.config:
        if text is None and data is None:
            raise EvaluationError(f"{task.name} needs a text; pass text=", argument="text")
        return text_source(task, data) if text is None else text  # type: ignore[arg-type]
    if data is None:
        if not task.online:
            raise EvaluationError(
                f"lm-eval has no task like {task.name}; give data=", argument="data"
            )
        return None
    shots = asked.shots_of(task)
    return configs(task, data, examples, asked.limit, shots, asked.max_new_tokens)


def _check_baseline(before: Evaluation, tasks: Sequence[Task], by: str) -> None:
    """Raise an error if an earlier evaluation lacks a task, or used another scorer."""
    for task in tasks:
        _ = before[task.name]
        if task.config and before.scorer != by:
            raise EvaluationError(f"the baseline was scored by {before.scorer}, not {by}")


def _evaluate(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    read: _Read,
    asked: Protocol,
    by: str,
) -> Evaluation:
    """Evaluate one model."""
    results, found = [], None
    for task in tasks:
        if task.config:
            results.append(scored(model, task, tokenizer, read[task.name], asked))
        else:
            result, found = measured(model, task, tokenizer, read[task.name], asked)
            results.append(result)
    return Evaluation(tuple(results), by, asked.seed, found)
