"""The name of models' key-value cache, which differs between releases of transformers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cache_name(model: PreTrainedModel) -> str:
    """Return the name of the cache among a model's arguments and outputs.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> cache_name(tiny) in ("cache", "past_key_values")
        True
    """
    taken = inspect.signature(model.forward).parameters
    return "cache" if "cache" in taken else "past_key_values"


def cache_of(model: PreTrainedModel, output: Any) -> Any:
    """Return the key-value cache in a model's output."""
    return output[cache_name(model)]
