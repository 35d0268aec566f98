"""Sequences that begin alike: the beginning is run once, and its keys and values are shared."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH = 64
"""Tokens that sharing must save: a pass more is not free."""
STRETCHED = ("dynamic", "longrope")
"""Rotations that depend on how long the whole sequence is: keys of a prefix are other keys."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Sequences for one pass.

    Attributes:
        prefix: how many of their first tokens are the same, and run once; 0 if none are shared.
        inputs: the whole sequences.
    """

    prefix: int
    inputs: Sequence[Tokens]


def batches(scored: Mapping[Tokens, int], size: int, *, share: bool) -> list[Batch]:
    """Put sequences together that begin alike, as choices after one question do, or are as long.

    Choices share a pass if they fill half a batch, so that there are not many small passes where
    large ones cost as little, as on a GPU.

    Args:
        scored: sequences, and how many of their last tokens logits are needed at.
        size: most sequences in a batch.
        share: whether the model can run a beginning once; see :func:`can_share`.

    Example:
        >>> question = tuple(range(40))
        >>> asked = {(*question, 1, 2): 2, (*question, 3, 4): 2, (*question, 5): 1, (7,): 1}
        >>> [(batch.prefix, len(batch.inputs)) for batch in batches(asked, 6, share=True)]
        [(40, 3), (0, 1)]
    """
    alike: dict[Tokens, list[Tokens]] = {}
    for tokens, last in scored.items():
        alike.setdefault(tokens[: len(tokens) - last], []).append(tokens)
    found, alone = [], []
    for prefix, inputs in alike.items():
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            saved = (len(part) - 1) * len(prefix)
            if share and saved >= WORTH and 2 * len(part) >= size:
                found.append(Batch(len(prefix), part))
            else:
                alone += part
    alone.sort(key=lambda tokens: (-len(tokens), tokens))
    found.sort(key=lambda batch: batch.inputs[0])  # what begins alike is run in turn
    whole = [Batch(0, alone[i : i + size]) for i in range(0, len(alone), size)]
    longest = sorted(found, key=lambda batch: -max(map(len, batch.inputs)))[:1]
    rest = [batch for batch in found if batch not in longest]
    return longest + whole + rest  # if memory runs out, it does at once


@torch.no_grad()
def can_share(model: PreTrainedModel) -> bool:
    """Whether a model gives the same logits when it goes on from the keys and values of a prefix.

    Its config is looked at, and it is tried on three tokens.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)
        >>> can_share(GPT2LMHeadModel(tiny).eval())
        True
    """
    config = model.config.get_text_config()
    rotations = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    if any(kind in str(rotations) for kind in STRETCHED):
        return False
    ids = torch.tensor([[0, 1, 0], [0, 1, 1]], device=model.device)
    try:
        options = Past(model).of((0, 1), copies=len(ids))
        layers = next(iter(options.values())).layers
        if not layers or any(type(layer) is not DynamicLayer for layer in layers):
            return False
        found = model(input_ids=ids[:, 2:], use_cache=True, **options).logits[:, -1]
        wanted = model(input_ids=ids, use_cache=False).logits[:, -1]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False  # whatever a model's own code makes of a past that it did not expect
    tolerance = 2 * torch.finfo(found.dtype).eps ** 0.5
    return bool((found - wanted).float().norm() <= tolerance * wanted.float().norm())


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

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> known = Past(tiny).of((1, 2, 3), copies=2)
        >>> tiny(input_ids=torch.tensor([[4], [5]]), **known).logits.shape
        torch.Size([2, 1, 8])
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Start without a past."""
        self._model = model
        self._tokens: Tokens = ()
        self._cache: Any = None

    @torch.no_grad()
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
