"""Runs what is around a stack of blocks, without the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tnlm.calibration.blocks import Blocks


class Bypass(nn.Module):
    """Stands for a block and returns its input, or a given state, as the block returns one.

    Args:
        block: whose attributes other code may read.
        like: an output of the block.
        state: returned in place of the input, if given.
    """

    def __init__(self, block: nn.Module, like: Any, state: Tensor | None = None) -> None:
        """Take the place of a block."""
        super().__init__()
        self.__dict__["block"] = block  # no child: it is not called, and its weights not read
        self._like, self._state = like, state

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the block, such as its kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state."""
        state = self._state
        if state is None:
            state = args[0] if args else kwargs["hidden_states"]
        if isinstance(self._like, tuple | list):
            return type(self._like)([state, *self._like[1:]])
        return state


@contextmanager
def bypassed(
    model: nn.Module, blocks: Blocks, like: Any, last: Tensor | None = None
) -> Iterator[None]:
    """Let a model pass over blocks for the length of a block of code.

    Args:
        model: holds the blocks.
        blocks: those that are not run.
        like: an output of one of them.
        last: what the last one returns; its input if None.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> blocks = list(model.named_children())
        >>> with bypassed(model, blocks, torch.ones(1), torch.zeros(1)):
        ...     model(torch.ones(1, 2))
        tensor([0.])
        >>> model[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    try:
        for number, (name, block) in enumerate(blocks, start=1):
            state = last if number == len(blocks) else None
            model.set_submodule(name, Bypass(block, like, state))
        yield
    finally:
        for name, block in blocks:
            model.set_submodule(name, block)
