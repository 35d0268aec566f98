"""Names of compressed modules and their parameters in different classes of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import nn

from tnlm.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tnlm.checkpoint.description import TnlmConfig


def names_in(model: PreTrainedModel, config: TnlmConfig) -> dict[str, str | None]:
    """Map every module in a config to its name in a model; None for a head the model lacks.

    Raises:
        CheckpointError: if the model has no such module.
    """
    return {name: _resolve(model, name) for name in config.modules}


def rename_in(config: TnlmConfig, names: Mapping[str, str | None]) -> None:
    """Rename the modules in a config; modules mapped to None keep their names.

    Heads that a model lacks stay listed, since a body saved alone may be loaded under its head.
    """
    config.tied = {rename(names, a): rename(names, b) for a, b in config.tied.items()}
    config.modules = {names[name] or name: entry for name, entry in config.modules.items()}


def owner_of(modules: Collection[str], parameter: str) -> str | None:
    """Return which of several modules holds a parameter, directly or in a child."""
    parts = parameter.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in modules:
            return ".".join(parts[:end])
    return None


def _resolve(model: PreTrainedModel, name: str) -> str | None:
    """Return a saved module's name in this class of model; None for a task head it lacks.

    A body (``LlamaModel``) lacks the prefix of a model with a head (``LlamaForCausalLM``).

    Raises:
        CheckpointError: if the body has no such module.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if has(model, candidate):
            return candidate
    is_body = model.base_model is model
    if (is_body and not name.startswith(prefix)) or (not is_body and _is_head(model, name, prefix)):
        return None
    raise CheckpointError(
        f"config.json names a module {name!r} that {type(model).__name__} does not have"
    )


def _is_head(model: PreTrainedModel, name: str, prefix: str) -> bool:
    """Return whether a name that this model lacks lies outside the body."""
    first = name.split(".")[0]
    return not name.startswith(prefix) and not hasattr(model.base_model, first)


def has(model: nn.Module, name: str) -> bool:
    """Return whether a model has a module of this name."""
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def rename(names: Mapping[str, str | None], parameter: str) -> str:
    """Return a parameter's name after its module is renamed."""
    module = owner_of(names, parameter) or parameter.rpartition(".")[0]
    return f"{names.get(module) or module}{parameter.removeprefix(module)}"


def with_wildcards(name: str) -> str:
    """Return a name with `*` for every index, as in transformers' parallel plans."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
