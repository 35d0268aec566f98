"""The items of one task, put to a model and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tnlm.errors import OptionError
from tnlm.evaluation.comparison import digest, figures
from tnlm.evaluation.encoding import encode, encode_all, window_of
from tnlm.evaluation.generation import generate
from tnlm.evaluation.likelihood import loglikelihoods
from tnlm.evaluation.perplexity import window_losses
from tnlm.evaluation.results import TaskResult
from tnlm.evaluation.rows import (
    Data,
    Source,
    example_rows,
    rows_of,
    text_source,
    with_examples,
)
from tnlm.evaluation.tasks import Answer, Item, Task

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


def scored(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    examples: Mapping[str, Source] | None,
    asked: Protocol,
) -> TaskResult:
    """Ask the items of one task, offline; the arguments are those of `tnlm.evaluate`."""
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


def measured(
    model: PreTrainedModel,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    asked: Protocol,
) -> TaskResult:
    """Measure the windows of a text; each is an item. The arguments are those of `scored`."""
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
