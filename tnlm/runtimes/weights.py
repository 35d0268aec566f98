"""The weights of a model as an ordinary class holds them: narrowed layers stay narrow."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.checkpoint.entries import Entry, small_module
from tnlm.checkpoint.naming import owner_of
from tnlm.checkpoint.transformers_plugin import config_of
from tnlm.errors import ModelError


def generation_config(model: PreTrainedModel) -> Any:
    """Return how a model generates, which can be written; None for one that does not generate.

    Raises:
        ModelError: if transformers refuses to write it.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> generation_config(LlamaModel(LlamaConfig(vocab_size=8, hidden_size=4,
        ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))) is None
        True
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:  # it checks only what was changed
            config.save_pretrained(folder)
    except ValueError as error:
        said = str(error).strip()
        raise ModelError(f"model.generation_config cannot be written: {said}") from error
    return config


@torch.no_grad()
def plain_weights(model: PreTrainedModel, leave: Collection[str] = ()) -> dict[str, Tensor]:
    """Return every weight of a model by its name in the ordinary class.

    Feed-forward layers that lost channels keep their smaller shapes; factors are multiplied out.
    Parameters that share memory in the model do so here.

    Args:
        model: dense, or compressed by tnlm.
        leave: compressed layers whose matrix is not needed; a bias of theirs is returned.

    Raises:
        ModelError: if a bias was added to a layer, for which the class has no place, or weights
            are offloaded.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=8,
        ...                                      num_hidden_layers=1, num_attention_heads=1))
        >>> plain_weights(model)["model.layers.0.mlp.up_proj.weight"].shape
        torch.Size([8, 4])
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("weights of the model are offloaded; load it without device_map")
    said = config_of(model)
    entries: Mapping[str, Entry] = {} if said is None else said.modules
    added = [name for name, entry in entries.items() if entry.get("bias_added")]
    if added:
        raise ModelError(
            f"{added[0]} and {len(added) - 1} others were given a bias, for which "
            f"{type(model).__name__} has no place; compress with a metric that adds none, such as "
            "'input'"
        )
    held = model.state_dict()
    found = {name: tensor for name, tensor in held.items() if owner_of(entries, name) is None}
    for name, entry in entries.items():
        module: Any = model.get_submodule(name)
        if name in leave:
            found |= {} if module.bias is None else {f"{name}.bias": module.bias.detach()}
            continue
        for part, tensor in small_module(entry, module).state_dict().items():
            found[f"{name}.{part}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}
