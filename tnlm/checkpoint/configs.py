"""Configs of compressed models: recognises them, and copies them before changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

METHOD = "tnlm"
GUARD = "IMPORT_TNLM_BEFORE_LOADING.safetensors"
"""The name of no file: without the plug-in, which clears it, transformers fails to load it."""


def is_ours(quantization_config: Any) -> bool:
    """Return whether a quantization config, as a dict or an object, belongs to tnlm.

    Example:
        >>> is_ours({"quant_method": "tnlm"}), is_ours(None)
        (True, False)
    """
    if isinstance(quantization_config, Mapping):
        return quantization_config.get("quant_method") == METHOD
    return getattr(quantization_config, "quant_method", None) == METHOD


def clear_guard(config: Any) -> None:
    """Remove the guard, so that transformers looks for the real files."""
    inner = (getattr(config, name, None) for name in type(config).sub_configs)
    for part in (config, *inner):
        if part is not None and vars(part).get("transformers_weights") == GUARD:
            del vars(part)["transformers_weights"]


def holders(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every module, with the attribute, that holds the model's own config object.

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
    """Give a model, and all its modules with the same config object, a copy of it; return the copy.

    Models may share a config object. Its nested configs are not copied, since towers hold them.
    """
    made = copy.copy(model.config)
    for module, name in list(holders(model)):
        setattr(module, name, made)
    return made
