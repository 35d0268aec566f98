"""Where a model's weights are: in memory, or on disk and read when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import nn

_HOME = "_tnlm_weights"
"""Attribute of a model whose weights are on disk: what reads them."""


class Offloaded(Protocol):
    """Reads a model's weights from disk.

    Attributes:
        identity: a hash of the files.
        scratch: folder for temporary files; None for the system's.
    """

    identity: str
    scratch: Path | None

    def load(self, module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
        """Read the weights of a module, and of all inside it, and return the parameters."""
        ...

    def free(self, parameters: Sequence[nn.Parameter]) -> None:
        """Free what :meth:`load` has read, unless another caller still needs it."""


def offload(model: nn.Module, weights: Offloaded) -> None:
    """Let :func:`resident` find what reads the weights of a model."""
    vars(model)[_HOME] = weights


def offloaded(model: nn.Module) -> Offloaded | None:
    """Return what reads a model's weights, or None if they are in memory.

    Example:
        >>> offloaded(nn.Linear(2, 3)) is None
        True
    """
    found: Offloaded | None = vars(model).get(_HOME)
    return found


def scratch_of(model: nn.Module) -> Path | None:
    """Return the folder for temporary files of work on a model; None for the system's.

    Example:
        >>> scratch_of(nn.Linear(2, 3)) is None
        True
    """
    weights = offloaded(model)
    return None if weights is None else weights.scratch


@contextmanager
def resident(
    model: nn.Module, *names: str | nn.Module | None, recurse: bool = True
) -> Iterator[None]:
    """Keep the weights of modules in memory for the length of a block.

    Does nothing for a model that is in memory. Blocks may be nested.

    Args:
        model: holds the modules.
        names: dotted names, or the modules themselves; None is passed over.
        recurse: whether the weights of the modules inside them are wanted as well.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> with resident(model, "0"):
        ...     model[0].weight.shape
        torch.Size([3, 2])
    """
    weights = offloaded(model)
    if weights is None:
        yield
        return
    held: list[nn.Parameter] = []
    try:
        for name in names:
            module = model.get_submodule(name) if isinstance(name, str) else name
            held += [] if module is None else weights.load(module, recurse)
        yield
    finally:
        weights.free(held)
