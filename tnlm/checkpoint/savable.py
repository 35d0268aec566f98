"""Checks, before a model is saved, that it can be loaded again."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from torch import nn

from tnlm.checkpoint.entries import build
from tnlm.checkpoint.naming import names_in
from tnlm.checkpoint.tensors import check_values
from tnlm.errors import CheckpointError, ModelError
from tnlm.layers.peft_names import is_adapter

if TYPE_CHECKING:  # importing it imports the plug-in
    from transformers import PreTrainedModel

    from tnlm.checkpoint.description import TnlmConfig


def check_savable(model: PreTrainedModel, said: TnlmConfig) -> None:
    """Raise `ModelError` unless a model matches its description and has finite values.

    It may have been trained, cut or edited since it was compressed.

    Args:
        model: the compressed model.
        said: its description for `config.json`.
    """
    _check_bare(model)
    _check_generation(model)
    try:
        names = names_in(model, said)
        for name, entry in said.modules.items():
            place = names[name]
            if place is not None:  # None is a head that this class of model lacks
                _check_module(place, entry, model.get_submodule(place))
        check_values(model, {place for place in names.values() if place is not None})
    except CheckpointError as error:
        raise ModelError(f"the model could not be loaded again: {error}") from error


def _check_bare(model: nn.Module) -> None:
    """Raise `ModelError` if a parameter is a tensor subclass or belongs to an adapter."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise ModelError(
                f"{name} is a {type(parameter).__name__}, which config.json cannot describe; "
                "save the model first, and quantize it after loading"
            )
    for name, module in model.named_modules():
        if is_adapter(module):
            raise ModelError(
                f"{name or 'the model'} has a PEFT adapter, which tnlm.save cannot store; save "
                "the result of merge_and_unload(), or the adapter alone with save_pretrained"
            )


def _check_generation(model: PreTrainedModel) -> None:
    """Raise `ModelError` if transformers refuses to write how the model generates."""
    config = model.generation_config if model.can_generate() else None
    if config is None:
        return
    with tempfile.TemporaryDirectory() as nowhere:
        try:
            config.save_pretrained(nowhere)
        except ValueError as error:
            raise ModelError(f"model.generation_config is invalid: {error}") from error


def _check_module(name: str, entry: dict[str, Any], module: nn.Module) -> None:
    """Raise `CheckpointError` unless a module holds the tensors that its entry names."""
    made = build(entry, device="meta", old=module)
    expected = {key: tensor.shape for key, tensor in made.state_dict().items()}
    found = {key: getattr(tensor, "shape", None) for key, tensor in module.state_dict().items()}
    if found != expected:
        raise CheckpointError(f"{name} was changed after the model was compressed")
