"""Greedy answers in text, generated until a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tnlm.errors import EvaluationError
from tnlm.evaluation.encoding import check_vocabulary, encode
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.tasks.base import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    names: Sequence[str],
    *,
    until: Sequence[str],
    window: int,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> list[Answer]:
    """Continue every prompt greedily, up to the first stop text or the end of text.

    A prompt that leaves no room in the window for ``max_new_tokens`` loses its first tokens.

    Args:
        model: a causal language model, left as it was.
        tokenizer: of the model.
        prompts: texts to continue.
        names: of the items they belong to, for errors.
        until: stop texts, which are cut off.
        window: most tokens that the model is shown.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts in one pass.
        progress: show a bar.
    """
    room = window - max_new_tokens
    if room < 1:
        raise EvaluationError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in a window of {window}; "
            f"use at most {window - 1}"
        )
    tokens = [encode(tokenizer, prompt)[-room:] for prompt in prompts]
    check_vocabulary(model, tokens, names)
    order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
    texts: dict[int, str] = {}
    with evaluating(model):
        for start in tqdm(range(0, len(order), batch_size), desc="answers", disable=not progress):
            batch = order[start : start + batch_size]
            made = _continue(model, tokenizer, [tokens[i] for i in batch], until, max_new_tokens)
            texts.update(zip(batch, made, strict=True))
    return [Answer(text=texts[index]) for index in range(len(prompts))]


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[list[int]],
    until: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Generate after prompts padded on the left."""
    longest = max(len(tokens) for tokens in batch)
    pad = tokenizer.pad_token_id
    pad = pad if isinstance(pad, int) else tokenizer.eos_token_id
    pad = pad if isinstance(pad, int) else 0
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    for row, seen, tokens in zip(ids, mask, batch, strict=True):
        row[longest - len(tokens) :] = torch.tensor(tokens)
        seen[longest - len(tokens) :] = 1
    # The model class mixes generate in, which its base's annotations do not know.
    generating: Any = model
    output = generating.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        stopping_criteria=_stops(tokenizer, until, longest),
    )
    made = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [cut(text, until) for text in made]


def _stops(tokenizer: PreTrainedTokenizerBase, until: Sequence[str], start: int) -> Any:
    """Return the criteria that end a row once its text holds a stop text."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stops(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            texts = tokenizer.batch_decode(input_ids[:, start:])
            done = [any(stop in text for stop in until) for text in texts]
            found: Tensor = torch.tensor(done, device=input_ids.device)
            return found

    return StoppingCriteriaList([Stops()])


def cut(text: str, until: Sequence[str]) -> str:
    """Cut a text at the first of the stop texts.

    Example:
        >>> cut("It is 5. Question: and", ["Question:"])
        'It is 5. '
    """
    for stop in until:
        text = text.split(stop)[0]
    return text
