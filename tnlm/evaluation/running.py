"""evaluate: benchmarks scored on a model, offline from local rows or online through lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.asking import Protocol, measured, scored
from tnlm.evaluation.comparison import compared
from tnlm.evaluation.harness import harness
from tnlm.evaluation.mode import check_causal
from tnlm.evaluation.results import Evaluation
from tnlm.evaluation.rows import Data, Source
from tnlm.evaluation.tasks import Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tasks: str | Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: Data | None = None,
    examples: Mapping[str, Source] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    baseline: PreTrainedModel | Evaluation | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    max_new_tokens: int = 256,
    seed: int = 1234,
    progress: bool = True,
) -> Evaluation:
    """Score a model on benchmarks, with standard errors, beside a baseline if there is one.

    With ``data`` everything happens here and offline. Prompts, the split into tokens and the
    scores are those of lm-evaluation-harness; without ``data`` it fetches the data and scores.

    Args:
        model: a causal language model, left as it was.
        tasks: names of :func:`tnlm.evaluation.list_tasks`.
        tokenizer: the model's own.
        data: a directory of JSONL files, or a file or rows for each task's name.
        examples: a file or rows for each task's name, to draw few-shot examples from; a
            directory as ``data`` may hold them as ``<task>_train.jsonl``.
        limit: items of each task, from the first; of MMLU and WinoBias the first of each part in
            turns; windows for ``"perplexity"``, otherwise 16. Without ``data`` it is lm-eval's,
            which counts each subject of MMLU apart.
        num_fewshot: examples before each item; None is the task's own number.
        baseline: a model that answers the same questions with the same tokenizer, or an earlier
            evaluation of them.
        batch_size: sequences in one pass.
        max_length: most tokens the model is shown; what is longer loses its first tokens, and
            the result counts how often. None is the model's positions.
        max_new_tokens: most tokens of a generated answer.
        seed: of the few-shot draws and bootstraps.
        progress: show bars.

    Returns:
        Figures, the scores of every item, and which answers the baseline did not share.

    Raises:
        OptionError: for an unknown task or option, or a missing package.
        EvaluationError: naming the item that cannot be asked, or whose score is not finite.

    Source:
        Tasks, prompts and scores: lm-evaluation-harness 0.4.13, but for StereoSet and WinoBias.
        Paired errors: Miller, "Adding error bars to evals", arXiv 2411.00640. Flips: Dutta et al.,
        "Accuracy is not all you need", arXiv 2407.09141.

    Example:
        >>> from tnlm.evaluation.tasks import get_task
        >>> get_task("piqa").metrics[0].name
        'acc'
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names or len(set(names)) < len(names):
        raise OptionError(f"tasks={names}; name at least one, and each once")
    chosen = [get_task(name) for name in names]
    if tokenizer is None:
        raise EvaluationError("an evaluation needs the model's tokenizer, got None")
    check_causal(model, "a benchmark's score")
    asked = Protocol(limit, num_fewshot, batch_size, max_length, max_new_tokens, seed, progress)
    found = _evaluate(model, chosen, tokenizer, data, examples, asked)
    if baseline is None:
        return found
    before = (
        baseline
        if isinstance(baseline, Evaluation)
        else _evaluate(baseline, chosen, tokenizer, data, examples, asked)
    )
    if before.scorer != found.scorer:
        raise EvaluationError(f"the baseline was scored by {before.scorer}, not {found.scorer}")
    pairs = zip(found.results, chosen, strict=True)
    results = tuple(compared(result, before, task.metrics, seed) for result, task in pairs)
    return Evaluation(results, found.scorer, seed)


def _evaluate(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    data: Data | None,
    examples: Mapping[str, Source] | None,
    asked: Protocol,
) -> Evaluation:
    """Evaluate one model alone."""
    if data is None:
        return harness(
            model,
            [task.name for task in tasks],
            tokenizer=tokenizer,
            examples=examples,
            limit=asked.limit,
            num_fewshot=asked.num_fewshot,
            batch_size=asked.batch_size,
            max_length=asked.max_length,
            max_new_tokens=asked.max_new_tokens,
            seed=asked.seed,
            progress=asked.progress,
        )
    results = tuple(
        measured(model, task, tokenizer, data, asked)
        if task.kind == "text"
        else scored(model, task, tokenizer, data, examples, asked)
        for task in tasks
    )
    return Evaluation(results, "tnlm", asked.seed)
