"""A model's config: what marks it as a compressed model's, and a copy to write to."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

METHOD = "tnlm"
GUARD = "IMPORT_TNLM_BEFORE_LOADING.safetensors"
"""A file name that no directory has: transformers alone stops there, the plug-in clears it."""


def is_ours(quantization_config: Any) -> bool:
    """Tell whether a quantization config, read or made, is one of tnlm.

    Example:
        >>> is_ours({"quant_method": "tnlm"}), is_ours(None)
        (True, False)
    """
    if isinstance(quantization_config, Mapping):
        return quantization_config.get("quant_method") == METHOD
    return getattr(quantization_config, "quant_method", None) == METHOD


def clear_guard(config: Any) -> None:
    """Take the guard away, so that transformers looks for the files that are there."""
    inner = (getattr(config, name, None) for name in type(config).sub_configs)
    for part in (config, *inner):
        if part is not None and vars(part).get("transformers_weights") == GUARD:
            del vars(part)["transformers_weights"]


def holders(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every module, and the attribute, that holds the very config object of a model.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...                    num_hidden_layers=1, num_attention_heads=1)
        >>> sorted({type(module).__name__ for module, _ in holders(LlamaModel(tiny))})
        ['LlamaAttention', 'LlamaMLP', 'LlamaModel', 'LlamaRotaryEmbedding']
    """
    config = getattr(model, "config", None)
    if config is not None:
        for module in model.modules():
            for name, value in vars(module).items():
                if value is config:
                    yield module, name


def own_config(model: nn.Module) -> Any:
    """Give a model, and all its modules that hold the same config, a copy of it, and return this.

    Models may share one object. Configs inside it stay what they are: towers hold them.
    """
    made = copy.copy(model.config)
    for module, name in list(holders(model)):
        setattr(module, name, made)
    return made
