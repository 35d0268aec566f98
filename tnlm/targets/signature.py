"""Signatures of modules: equal if one trial is enough for both."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

from torch import nn

_NUMBER = re.compile(r"_?(layer|block)_?(idx|id|index|number|num)$")
"""Attributes for a module's index in the model, which are ignored."""


def signature(module: nn.Module) -> Hashable:
    """Return a value that is equal for modules of the same classes, shapes and settings.

    It includes numbers and strings stored in the modules, except their layer index.

    Example:
        >>> first, second = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
        >>> signature(first) == signature(second) != signature(nn.Sequential(nn.Linear(3, 2)))
        True
    """
    return tuple((name, type(each), _own(each)) for name, each in module.named_modules())


def _own(module: nn.Module) -> Hashable:
    """Return the signature of a module without its children."""
    tensors = {**module._parameters, **module._buffers}
    shapes = tuple(
        (name, None if held is None else (held.shape, held.dtype, held.device))
        for name, held in tensors.items()
    )
    settings = tuple(
        (name, _value(value))
        for name, value in vars(module).items()
        if name != "training" and not name.endswith("_hooks") and not _NUMBER.search(name)
    )
    return shapes, settings


def _value(value: Any) -> Hashable:
    """Return a plain value as it is, a function's name, or the type of anything else."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        return type(value).__name__, value
    if isinstance(value, list | tuple):
        return tuple(_value(each) for each in value)
    return id(value) if callable(value) else type(value).__qualname__
