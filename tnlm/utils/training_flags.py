"""Restores the training flags of modules after a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Restore every module's training flag after a block, even if it fails.

    Example:
        >>> from torch import nn
        >>> model = nn.Dropout()
        >>> with modes_kept(model):
        ...     _ = model.eval()
        >>> model.training
        True
    """
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
