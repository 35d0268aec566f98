"""A matrix of a model that is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Matrix = nn.Linear | Conv1D | nn.Embedding
"""The modules whose weight is a matrix."""


Selector = str | type | Sequence["str | type"]


@dataclass(frozen=True)
class Target:
    """One matrix that is compressed.

    Attributes:
        name: unique; the module's name, with the part's name appended for a fused module.
        module: dotted name of the module that is replaced.
        kind: ``"linear"`` or ``"embedding"``.
        shape: ``(out, in)``; for an embedding (vocabulary, width).
        part: which of the module's ``parts`` equal blocks of rows this is.
        parts: names of the blocks of a fused module, empty for an ordinary one.
        tied: other modules that use the same weight (a tied output head).
        share: of the tokens that meet it: k of E for one of E experts.
    """

    name: str
    module: str
    kind: str
    shape: tuple[int, int]
    part: int = 0
    parts: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    share: float = 1.0

    @property
    def params(self) -> int:
        """Numbers in the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def most(self) -> int:
        """Numbers that a replacement may have at most: fewer than the matrix itself."""
        return self.params - 1

    @property
    def copies(self) -> int:
        """How many matrices the target stands for, each of which is applied by itself."""
        return 1

    def weight(self, model: nn.Module) -> Tensor:
        """Return the ``(out, in)`` weight, a view of the model's own tensor."""
        return self.view(model.get_submodule(self.module))

    def view(self, module: Any) -> Tensor:
        """Return the ``(out, in)`` weight in a module like the target's, a view of its tensor."""
        return self.part_of(module, module.weight.detach())

    def part_of(self, module: nn.Module, stored: Tensor) -> Tensor:
        """Return the target's ``(out, in)`` part of a tensor laid out like the module's weight."""
        turned = stored.T if isinstance(module, Conv1D) else stored  # GPT-2 stores (in, out)
        return turned.narrow(0, self.part * self.shape[0], self.shape[0])

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return the bias that belongs to the matrix, if any."""
        bias: Tensor | None = getattr(model.get_submodule(self.module), "bias", None)
        start = self.part * self.shape[0]
        return None if bias is None else bias.detach()[start : start + self.shape[0]]


def members_of(unit: Target) -> tuple[Target, ...]:
    """Return the targets that a unit of several stands for, or the target itself."""
    members: tuple[Target, ...] = getattr(unit, "members", ())
    return members or (unit,)
