"""Hidden states between two blocks, in memory or, for a model whose weights are on disk, there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tnlm.utils.residency import offloaded, scratch_of
from tnlm.utils.spill import Slot, Spill

if TYPE_CHECKING:
    from torch import nn


class States:
    """One hidden state for each batch.

    Args:
        model: whose states they are; it decides where they are kept.
        states: the first ones.
        on_disk: whether they are on disk even if the model is in memory.

    Example:
        >>> import torch
        >>> states = States(torch.nn.Linear(1, 1), [torch.zeros(2), torch.ones(2)])
        >>> states[1] = states[0] + 2
        >>> [state.tolist() for state in states]
        [[0.0, 0.0], [2.0, 2.0]]
    """

    def __init__(
        self, model: nn.Module, states: Iterable[Tensor], *, on_disk: bool = False
    ) -> None:
        """Keep the first states."""
        spills = on_disk or offloaded(model) is not None
        self._spill = Spill(scratch_of(model)) if spills else None
        self._held: list[Tensor | Slot] = []
        for state in states:
            self._held.append(state if self._spill is None else self._spill.put(state))

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self._held)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield one state after the other."""
        return (self[index] for index in range(len(self)))

    def like(self) -> Iterator[Tensor]:
        """Yield a tensor of the shape and dtype of every state, without reading it."""
        for held in self._held:
            if isinstance(held, Tensor):
                yield held
            else:
                yield torch.empty(held.shape, dtype=held.dtype, device="meta")

    def __getitem__(self, index: int) -> Tensor:
        """Return a state."""
        held = self._held[index]
        if isinstance(held, Tensor) or self._spill is None:
            return held  # type: ignore[return-value]  # without a file, all are tensors
        return self._spill.take(held)

    def __setitem__(self, index: int, state: Tensor) -> None:
        """Replace a state; on disk, its space is used again."""
        held = self._held[index]
        if self._spill is None or isinstance(held, Tensor):
            self._held[index] = state
        else:
            self._held[index] = self._spill.put(state, instead=held)
