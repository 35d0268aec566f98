"""Descriptions of models inside a compressed model, and of models that contain compressed ones.

Towers and bodies have their own `save_pretrained`, and no reference to the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from tnlm.checkpoint.naming import names_in, rename_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tnlm.checkpoint.description import TnlmConfig

PART = "_tnlm_part"
"""Attribute of a model inside a compressed one: its description if it is saved alone."""


def submodels(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the models inside a model, such as the body of a head, with their names."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel):
            yield name, module


def describe_parts(model: PreTrainedModel, config: TnlmConfig) -> None:
    """Attach to every model inside a compressed one a description of that part alone."""
    for name, part in submodels(model):
        vars(part).pop(PART, None)
        said = _of_body(part, config) if part is model.base_model else _within(config, name)
        if said.modules:
            setattr(part, PART, said)


def _of_body(body: PreTrainedModel, config: TnlmConfig) -> TnlmConfig:
    """Return the description in the names of the body, with the head's entries kept."""
    said = copy.copy(config)
    rename_in(said, names_in(body, said))
    return said


def _within(config: TnlmConfig, name: str) -> TnlmConfig:
    """Return the description of the modules inside a module, with names relative to it."""
    said, prefix = copy.copy(config), f"{name}."
    said.modules = {
        inner.removeprefix(prefix): entry
        for inner, entry in config.modules.items()
        if inner.startswith(prefix)
    }
    said.tied = {
        target.removeprefix(prefix): source.removeprefix(prefix)
        for target, source in config.tied.items()
        if target.startswith(prefix) and source.startswith(prefix)
    }
    return said


def around(inner: Mapping[str, TnlmConfig]) -> TnlmConfig | None:
    """Return the description of a model that contains compressed models, or None if none."""
    if not inner:
        return None
    said = copy.copy(next(iter(inner.values())))
    said.modules = {
        f"{name}.{module}": entry
        for name, config in inner.items()
        for module, entry in config.modules.items()
    }
    said.tied = {
        f"{name}.{target}": f"{name}.{source}"
        for name, config in inner.items()
        for target, source in config.tied.items()
    }
    return said
