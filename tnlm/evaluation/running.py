"""evaluate: benchmarks scored on a model, offline from local rows or online through lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.comparison import compared, digest, figures
from tnlm.evaluation.encoding import encode, encode_all, window_of
from tnlm.evaluation.generation import generate
from tnlm.evaluation.harness import harness
from tnlm.evaluation.likelihood import loglikelihoods
from tnlm.evaluation.perplexity import window_losses
from tnlm.evaluation.results import Evaluation, TaskResult
from tnlm.evaluation.rows import (
    Data,
    Source,
    example_rows,
    rows_of,
    text_source,
    with_examples,
)
from tnlm.evaluation.tasks import Answer, Item, Task, get_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOWS = 16
_WINDOW = 512


@dataclass(frozen=True)
class Protocol:
    """How a model is asked: the arguments of :func:`evaluate` of the same names."""

    limit: int | None
    num_fewshot: int | None
    batch_size: int
    max_length: int | None
    max_new_tokens: int
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"{name}={value}, but at least {least} is needed")
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens={self.max_new_tokens}, but at least 1 is needed")


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
    asked = Protocol(limit, num_fewshot, batch_size, max_length, max_new_tokens, seed, progress)
    if examples is not None and data is None:
        raise OptionError("examples= needs data=; without it lm-eval draws its own")
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
            limit=asked.limit,
            num_fewshot=asked.num_fewshot,
            batch_size=asked.batch_size,
            max_length=asked.max_length,
            max_new_tokens=asked.max_new_tokens,
            seed=asked.seed,
            progress=asked.progress,
        )
    results = tuple(
        _text(model, task, tokenizer, data, asked)
        if task.kind == "text"
        else _scored(model, task, tokenizer, data, examples, asked)
        for task in tasks
    )
    return Evaluation(results, "tnlm", asked.seed)


def _scored(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    examples: Mapping[str, Source] | None,
    asked: Protocol,
) -> TaskResult:
    """Ask the items of one task."""
    rows = rows_of(task, data, asked.limit)
    shots = task.num_fewshot if asked.num_fewshot is None else asked.num_fewshot
    pool = example_rows(task, data, examples) if shots else None
    solved = None if pool is None else [task.item(row) for row in pool]
    plain = [task.item(row) for row in rows]
    items = with_examples(task, plain, solved, shots, asked.seed)
    answers, truncated = _answers(model, task, tokenizer, items, asked)
    scores = tuple(task.score(item, each) for item, each in zip(items, answers, strict=True))
    return TaskResult(
        task=task.name,
        n=len(items),
        num_fewshot=shots,
        truncated=truncated,
        figures=figures(task.metrics, scores, asked.seed),
        right=task.right,
        items=scores,
        digest=digest([[item.pairs, item.gold, item.answer] for item in items]),
    )


def _answers(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    asked: Protocol,
) -> tuple[list[list[Answer]], int]:
    """Return the answers to every item, and how many questions did not fit the window."""
    pairs = [pair for item in items for pair in item.pairs]
    names = [f"{task.name} item {i}" for i, item in enumerate(items) for _ in item.pairs]
    window = window_of(model, tokenizer, asked.max_length)
    if task.kind == "generation":
        prompts = [context for context, _ in pairs]
        room = window - asked.max_new_tokens
        truncated = sum(len(encode(tokenizer, prompt)) > room for prompt in prompts)
        flat = generate(
            model,
            tokenizer,
            prompts,
            names,
            until=task.until,
            window=window,
            max_new_tokens=asked.max_new_tokens,
            batch_size=asked.batch_size,
            progress=asked.progress,
        )
    else:
        encoded = encode_all(tokenizer, pairs, names, window)
        truncated = sum(len(e.context) + len(e.continuation) > window + 1 for e in encoded)
        flat = loglikelihoods(
            model,
            encoded,
            names,
            window=window,
            batch_size=asked.batch_size,
            progress=asked.progress,
        )
    rest = iter(flat)
    return [[next(rest) for _ in item.pairs] for item in items], truncated


def _text(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    asked: Protocol,
) -> TaskResult:
    """Measure the windows of a text; each is an item."""
    window = min(_WINDOW, window_of(model, tokenizer, asked.max_length))
    ids, losses = window_losses(
        model,
        text_source(task, data),
        tokenizer,
        window=window,
        windows=asked.limit or _WINDOWS,
        progress=asked.progress,
    )
    answers = [Answer(loglikelihood=-loss, tokens=window - 1) for loss in losses]
    scores = tuple(task.score(Item(pairs=()), [answer]) for answer in answers)
    return TaskResult(
        task=task.name,
        n=len(scores),
        num_fewshot=0,
        truncated=0,
        figures=figures(task.metrics, scores, asked.seed),
        right=task.right,
        items=scores,
        digest=digest(ids.tolist()),
    )
