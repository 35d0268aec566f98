"""Removes rows from modules, such as dropped experts from a router or from stacked experts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

COUNTS = "expert"
"""Part of the names of attributes that count experts."""


def with_rows(module: nn.Module, names: Collection[str], count: int, kept: Tensor) -> nn.Module:
    """Return a copy of a module with only the kept rows of some tensors.

    Attributes that count experts are updated in the module and its children. Everything else is
    shared with the original, which is left unchanged; hooks are not copied.

    Args:
        module: any module; the copy has the same class.
        names: parameters and buffers that lose rows.
        count: number of rows before, which is the number of experts.
        kept: indices of the rows to keep, in their new order.

    Example:
        >>> import torch
        >>> router = nn.Linear(4, 8)
        >>> router.num_experts = 8
        >>> small = with_rows(router, row_tensors(router, 8), 8, torch.tensor([1, 6]))
        >>> tuple(small.weight.shape), tuple(small.bias.shape), small.num_experts
        ((2, 4), (2,), 2)
        >>> bool((small.weight[1] == router.weight[6]).all()), router.num_experts
        (True, 8)
    """
    made = _bare(module)
    held: dict[str, Any] = made.__dict__
    for name, value in vars(module).items():
        if _counts(name, value, count):
            held[name] = len(kept)
    for kind in ("_parameters", "_buffers"):
        held[kind] = {
            name: _rows(tensor, kept) if name in names else tensor
            for name, tensor in vars(module)[kind].items()
        }
    held["_modules"] = {
        name: None if child is None else with_rows(child, _below(names, name), count, kept)
        for name, child in module._modules.items()
    }
    return made


def _bare(module: nn.Module) -> nn.Module:
    """Return a copy of a module without its hooks."""
    made = copy.copy(module)
    for name in vars(module):
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            made.__dict__[name] = OrderedDict()
    return made


def row_tensors(module: nn.Module, count: int) -> list[str]:
    """Return the names of a module's parameters and buffers with ``count`` rows.

    Example:
        >>> row_tensors(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), 8)
        ['0.weight', '0.bias']
    """
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [name for name, tensor in tensors if tensor.dim() and len(tensor) == count]


def set_counts(module: nn.Module, count: int, new: int) -> None:
    """Set the attributes that count experts, in a module and its children, to a new count."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if _counts(name, value, count):
                setattr(part, name, new)


def _counts(name: str, value: Any, count: int) -> bool:
    return type(value) is int and value == count and COUNTS in name


def _below(names: Collection[str], child: str) -> list[str]:
    return [name.removeprefix(f"{child}.") for name in names if name.startswith(f"{child}.")]


def _rows(tensor: Tensor | None, kept: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    rows = tensor.detach()[kept.to(tensor.device)]
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(rows, requires_grad=tensor.requires_grad)
    return rows
