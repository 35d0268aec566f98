"""Puts packed layers in the place of plain ones, and back; counts the parameters of both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from tnlm.layers.arranged import filled
from tnlm.layers.packed import Packed, PackedEmbedding, PackedLinear
from tnlm.precision.grid import Precision


def packed(module: nn.Module, grids: Mapping[str, Precision]) -> nn.Module:
    """Return a module with (uninitialised) packed layers in the place of linear ones and tables.

    Args:
        module: changed in place, unless it is itself one of them.
        grids: the precision of each, by its name in the module; ``""`` is the module itself.

    Example:
        >>> packed(nn.Sequential(nn.Linear(16, 4)), {"0": Precision(4)})
        Sequential(
          (0): PackedLinear(4, 16, int4, group=64)
        )
    """
    for name, precision in grids.items():
        made = _like(module.get_submodule(name), precision)
        if not name:
            return made
        module.set_submodule(name, made)
    return module


def unpacked(module: nn.Module) -> nn.Module:
    """Return a module with plain layers in the place of packed ones, or itself if it has none.

    Example:
        >>> unpacked(PackedLinear(4, 16, Precision(4)))
        ArrangedLinear(in_features=16, out_features=4, bias=False)
    """
    if isinstance(module, PackedEmbedding):
        table, learns = module.weight.detach(), module.scales.requires_grad
        rows, columns = table.shape
        plain = nn.Embedding(rows, columns, module.padding_idx, _weight=table, _freeze=not learns)
        return plain.train(module.training)
    if isinstance(module, PackedLinear):
        layer = filled(module.weight.detach(), module.bias)
        layer.weight.requires_grad_(module.scales.requires_grad)
        return layer.train(module.training)
    inner = [name for name, child in module.named_modules() if isinstance(child, Packed)]
    if not inner:
        return module
    copied = copy.deepcopy(module)
    for name in inner:
        copied.set_submodule(name, unpacked(copied.get_submodule(name)))
    return copied


def count_parameters(model: nn.Module) -> int:
    """Return the parameters of a model, shared ones once, with one for every code.

    Example:
        >>> count_parameters(PackedLinear(4, 16, Precision(4), bias=True))
        68
    """
    scales = {id(m.scales) for m in model.modules() if isinstance(m, Packed)}
    held = {id(p): p.numel() for p in model.parameters() if id(p) not in scales}
    codes = {id(m): len(m.codes) * m.columns for m in model.modules() if isinstance(m, Packed)}
    return sum(held.values()) + sum(codes.values())


def _like(old: Any, precision: Precision) -> Packed:
    """Return a packed layer of the sizes, device and dtype of a linear one, or of a table."""
    made: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    rows, columns = old.weight.shape
    if isinstance(old, nn.Embedding):
        table = PackedEmbedding(rows, columns, precision, **made)
        table.padding_idx = old.padding_idx
        return table.train(old.training)
    new = PackedLinear(rows, columns, precision, bias=old.bias is not None, **made)
    return new.train(old.training)
