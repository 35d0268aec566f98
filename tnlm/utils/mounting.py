"""Restores a model's modules after a trial has replaced them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modules_kept(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Module]]:
    """Restore modules of a model after a block, even if it fails.

    Args:
        model: the block may replace these modules of it.
        names: dotted names of the modules.

    Yields:
        The model's own modules by name.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with modules_kept(model, ["0"]):
        ...     model[0] = nn.Identity()
        >>> model[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    own = {name: model.get_submodule(name) for name in names}
    try:
        yield own
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)
