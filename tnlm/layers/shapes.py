"""The shape of a module's matrix."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return the ``(out, in)`` shape of a linear, Conv1D or embedding module.

    Example:
        >>> shape_of(nn.Linear(3, 5))
        (5, 3)
    """
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)
