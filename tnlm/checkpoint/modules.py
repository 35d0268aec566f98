"""Limits the number of modules while a model is built from an untrusted config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch.nn.modules.module import register_module_module_registration_hook

from tnlm.errors import CheckpointError


@contextmanager
def at_most(count: int) -> Iterator[None]:
    """Raise `CheckpointError` if this thread adds more than this many modules to others.

    One value in a config can create any number of layers, which would take hours and all memory
    before a missing tensor is noticed.

    Example:
        >>> from torch import nn
        >>> with at_most(2):
        ...     nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: config.json asks for more than 2 modules, ...
    """
    added, thread = 0, get_ident()

    def counted(*_: Any) -> None:
        nonlocal added
        added += get_ident() == thread
        if added > count:
            raise CheckpointError(
                f"config.json asks for more than {count} modules, far too many for the tensors of "
                "the checkpoint"
            )

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
