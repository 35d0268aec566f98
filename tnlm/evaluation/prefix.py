"""Sequences that begin alike: the beginning is run once, and its keys and values are shared."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH = 64
"""Tokens that sharing must save: a pass more is not free."""

Tokens = tuple[int, ...]


class Batch(NamedTuple):
    """Sequences for one pass.

    Attributes:
        prefix: how many of their first tokens are the same, and run once; 0 if none are shared.
        inputs: the whole sequences.
    """

    prefix: int
    inputs: Sequence[Tokens]


def batches(scored: Mapping[Tokens, int], size: int, *, share: bool) -> list[Batch]:
    """Put sequences together that begin alike, as choices after one question do, or are as long.

    Args:
        scored: sequences, and how many of their last tokens logits are needed at.
        size: most sequences in a batch.
        share: whether the model can run a beginning once; see :func:`can_share`.

    Example:
        >>> question = tuple(range(40))
        >>> asked = {(*question, 1, 2): 2, (*question, 3, 4): 2, (*question, 5): 1, (7,): 1}
        >>> [(batch.prefix, len(batch.inputs)) for batch in batches(asked, 8, share=True)]
        [(0, 1), (40, 3)]
    """
    alike: dict[Tokens, list[Tokens]] = {}
    for tokens, last in scored.items():
        alike.setdefault(tokens[: len(tokens) - last], []).append(tokens)
    found, alone = [], []
    for prefix, inputs in alike.items():
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            if share and (len(part) - 1) * len(prefix) >= WORTH:
                found.append(Batch(len(prefix), part))
            else:
                alone += part
    alone.sort(key=lambda tokens: (-len(tokens), tokens))  # if memory runs out, it does at once
    found.sort(key=lambda batch: batch.inputs[0])  # what begins alike is run in turn
    return [Batch(0, alone[i : i + size]) for i in range(0, len(alone), size)] + found


def can_share(model: PreTrainedModel) -> bool:
    """Whether a model keeps nothing of its past but keys and values of all tokens."""
    layers = DynamicCache(config=model.config).layers
    takes = {"use_cache", cache_name(model)} <= set(inspect.signature(model.forward).parameters)
    return takes and bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def cache_name(model: PreTrainedModel) -> str:
    """Return what a model calls the keys and values of its past; releases of transformers differ.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> cache_name(tiny) in ("cache", "past_key_values")
        True
    """
    taken = inspect.signature(model.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def cache_of(model: PreTrainedModel, output: Any) -> Any:
    """Return the keys and values that a model's output carries on."""
    return output[cache_name(model)]


class Past:
    """Keys and values of the latest prefix; the next one goes on from where the two agree.

    So examples before the questions, which all of a task's prefixes begin with, are run once.

    Args:
        model: one that :func:`can_share`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Start without a past."""
        self._model = model
        self._tokens: Tokens = ()
        self._cache: Any = None

    def of(self, prefix: Tokens, copies: int) -> dict[str, Any]:
        """Return what continues a prefix in so many sequences, as keywords."""
        same = _agree(self._tokens, prefix)
        if same < WORTH:
            same, self._cache = 0, None
        elif same < len(self._tokens):
            self._cache.crop(same - len(self._tokens))
        if same < len(prefix):
            self._run(prefix[same:])
        self._tokens = prefix
        past = copy.deepcopy(self._cache)
        past.batch_repeat_interleave(copies)
        return {cache_name(self._model): past}

    def _run(self, tokens: Tokens) -> None:
        options: dict[str, Any] = {"use_cache": True}
        if self._cache is not None:
            options[cache_name(self._model)] = self._cache
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            options["logits_to_keep"] = 1  # none is looked at
        ids = torch.tensor([tokens], device=self._model.device)
        self._cache = cache_of(self._model, self._model(input_ids=ids, **options))


def _agree(first: Tokens, second: Tokens) -> int:
    """Return how many tokens two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
