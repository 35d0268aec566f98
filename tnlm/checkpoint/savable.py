"""Whether a model can be read back once it is written: asked before anything is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tnlm.checkpoint.entries import build
from tnlm.checkpoint.naming import names_in
from tnlm.checkpoint.tensors import check_values
from tnlm.errors import CheckpointError, ModelError
from tnlm.layers.peft_names import is_adapter

if TYPE_CHECKING:  # whose import imports the plug-in
    from transformers import PreTrainedModel

    from tnlm.checkpoint.description import TnlmConfig


def check_savable(model: PreTrainedModel, said: TnlmConfig) -> None:
    """Raise `ModelError` unless a model is what will be said of it, in values that load.

    It may have been trained, cut or edited since it was compressed.

    Args:
        model: compressed.
        said: what `config.json` will say of it.
    """
    _check_bare(model)
    try:
        names = names_in(model, said)
        for name, entry in said.modules.items():
            place = names[name]
            if place is not None:  # else a head that this class of model lacks
                _check_module(place, entry, model.get_submodule(place))
        check_values(model, {place for place in names.values() if place is not None})
    except CheckpointError as error:
        raise ModelError(f"the model could not be loaded again: {error}") from error


def _check_bare(model: nn.Module) -> None:
    """Raise `ModelError` if a parameter is more than its numbers, or belongs to an adapter."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            raise ModelError(
                f"{name} is held as {type(parameter).__name__}, of which config.json says nothing; "
                "save the model first, and quantize it after loading"
            )
    for name, module in model.named_modules():
        if is_adapter(module):
            raise ModelError(
                f"{name or 'the model'} has an adapter of PEFT, which a directory of the whole "
                "model cannot hold; save what merge_and_unload() returns, or the adapter alone "
                "by save_pretrained"
            )


def _check_module(name: str, entry: dict[str, Any], module: nn.Module) -> None:
    """Raise `CheckpointError` unless a module holds the tensors that its entry names."""
    made = build(entry, device="meta")
    expected = {key: tensor.shape for key, tensor in made.state_dict().items()}
    found = {key: getattr(tensor, "shape", None) for key, tensor in module.state_dict().items()}
    if found != expected:
        raise CheckpointError(f"{name} was changed after the model was compressed")
