"""Puts fitted modules into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from tnlm.checkpoint.entries import Entry
from tnlm.layers.swap import Shelf, Swap
from tnlm.targets.base import Member


def install(
    model: PreTrainedModel,
    swap: Swap,
    targets: Sequence[Member],
    fitted: Mapping[str, Entry],
    shelf: Shelf,
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Put the fitted parts of one module, and its tied heads, into the model.

    Args:
        model: edited in place.
        swap: replaces modules, and can undo it.
        targets: all targets of one module.
        fitted: entry of each target, by name.
        shelf: holds the module of each target, by name.

    Returns:
        Entries by module name, and tied parameters: each name with the name it shares.
    """
    first = targets[0]
    module = first.assemble(targets, {target.name: shelf.take(target.name) for target in targets})
    entries, tied = first.describe(model, targets, fitted)
    first.install(model, swap, module, entries)
    return entries, tied


def replace_norm(model: nn.Module, swap: Swap, name: str, norm: nn.Module) -> None:
    """Put a tuned norm into the model, trainable if the old one was."""
    old = model.get_submodule(name)
    for parameter, before in zip(norm.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
    swap.replace(name, norm.train(old.training))
