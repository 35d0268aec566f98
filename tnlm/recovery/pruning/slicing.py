"""Slices groups out of a model, which becomes an ordinary smaller model of the same class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tnlm.checkpoint.configs import own_config
from tnlm.errors import ModelError, TrainingError
from tnlm.layers.swap import Swap
from tnlm.recovery.pruning.groups import Cut, Groups
from tnlm.recovery.pruning.sizes import resized
from tnlm.utils.undo import attempt

Kept = Mapping[Groups, Tensor]
"""The indices of the groups to keep, for every block and kind."""


def smaller(
    model: PreTrainedModel,
    groups: Sequence[Groups],
    counts: Mapping[str, int],
    values: Mapping[str, int],
) -> PreTrainedModel:
    """Return the model that transformers builds from the new config, on the meta device.

    Args:
        model: not changed.
        groups: the groups of all blocks.
        counts: how many groups of each kind to keep.
        values: the config's new values.

    Raises:
        ModelError: if its parameters do not match those that slicing leaves; the sliced model could
            be saved, but not loaded.
    """
    with torch.random.fork_rng([]), torch.device("meta"):  # some models draw even on meta
        made = type(model)(resized(model.config, values))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for block in groups:
        for cut in block.cuts:
            module = model.get_submodule(cut.module)
            size = cut.slabs.each * counts[block.kind]
            shapes[f"{cut.module}.weight"][cut.axis ^ isinstance(module, Conv1D)] = size
            if cut.axis == 0 and f"{cut.module}.bias" in shapes:
                shapes[f"{cut.module}.bias"] = [size]
    for name, parameter in made.named_parameters():
        if name in shapes and shapes[name] != list(parameter.shape):
            raise ModelError(
                f"{type(model).__name__} builds {name} as {list(parameter.shape)} from "
                f"{dict(values)}, but slicing leaves {shapes[name]}, which its config cannot "
                "express; use heads=False or channels=False"
            )
    return made


def cut_groups(
    model: PreTrainedModel,
    template: PreTrainedModel,
    kept: Kept,
    values: Mapping[str, int],
    weights: Mapping[str, Callable[[], Tensor]],
) -> None:
    """Slice a model in place, or leave it unchanged if anything fails.

    Args:
        model: the model to slice.
        template: the result of :func:`smaller`.
        kept: the groups to keep.
        values: the config's new values.
        weights: functions that return the full ``(out, in)`` weight of each replaced module.

    Raises:
        TrainingError: if a weight is not finite in the model's dtype.
    """
    cuts = {
        cut.module: (cut, cut.slabs.rows(index, block.count))
        for block, index in kept.items()
        for cut in block.cuts
    }
    swap = Swap(model)

    def cut() -> None:
        for name, make in weights.items():
            old, empty = model.get_submodule(name), template.get_submodule(name)
            made = _fill(empty, old, make(), *cuts.get(name, (None, None)))
            if not bool(made.weight.isfinite().all()):
                raise TrainingError(
                    f"the merged weight of {name} is not finite; nothing was changed"
                )
            swap.replace(name, made)
        config = own_config(model)  # models that share the config keep their sizes
        for name, value in values.items():
            setattr(config, name, value)
        for block in kept:
            _copy_sizes(model.get_submodule(block.parent), template.get_submodule(block.parent))

    attempt(cut, swap.undo)


def _fill(made: Any, old: Any, weight: Tensor, cut: Cut | None, kept: Tensor | None) -> Any:
    """Fill an empty module with the kept part of a weight and of the old module's bias."""
    bias = old.bias
    if cut is not None and kept is not None:
        index = kept.to(weight.device)
        weight = weight.index_select(cut.axis, index)
        if bias is not None and cut.axis == 0:
            bias = nn.Parameter(bias.detach()[index], requires_grad=bias.requires_grad)
    weight = (weight.T if isinstance(old, Conv1D) else weight).to(old.weight.dtype)
    made.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    made.weight.requires_grad_(old.weight.requires_grad)
    made.bias = bias
    made.train(old.training)
    return made


def _copy_sizes(model: nn.Module, template: nn.Module) -> None:
    """Copy sizes stored in modules, such as a number of heads, from the template."""
    there = dict(template.named_modules())
    for name, module in model.named_modules():
        other = vars(there.get(name, module))
        for key, value in vars(module).items():
            if type(value) is int and type(other.get(key)) is int:
                setattr(module, key, other[key])
