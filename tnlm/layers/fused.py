"""`FusedLinear`: several maps of one input in one module, as GPT-2's ``c_attn``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """How the rows of several matrices lie in one module.

    The rows are those of all parts one after another; or, in several groups, a share of every
    part's rows after another, as the heads in GPT-NeoX's ``query_key_value``.

    Attributes:
        parts: names of the matrices, in their order.
        sizes: rows of each in all.
        groups: in how many groups they alternate.
    """

    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    @property
    def runs(self) -> tuple[int, ...]:
        """Adjacent rows of each part."""
        return tuple(size // self.groups for size in self.sizes)

    def rows(self, part: int) -> slice | Tensor:
        """Return where the rows of a part are: a slice, or an index if it has several groups.

        Example:
            >>> Layout(("q", "k"), (4, 2)).rows(1)
            slice(4, 6, None)
            >>> Layout(("q", "k"), (4, 2), groups=2).rows(0)
            tensor([0, 1, 3, 4])
        """
        start, run = sum(self.runs[:part]), self.runs[part]
        if self.groups == 1:
            return slice(start, start + run)
        starts = torch.arange(self.groups) * sum(self.runs) + start
        return (starts.unsqueeze(1) + torch.arange(run)).flatten()


def joined(parts: Sequence[Tensor], runs: Sequence[int] = (), dim: int = -1) -> Tensor:
    """Return tensors one after another, or so many entries of each in turn.

    Example:
        >>> joined([torch.tensor([1, 2, 3, 4]), torch.tensor([8, 9])], runs=(2, 1)).tolist()
        [1, 2, 8, 3, 4, 9]
    """
    if not runs:
        return torch.cat(list(parts), dim)
    dim %= parts[0].dim()
    split = [part.unflatten(dim, (-1, run)) for part, run in zip(parts, runs, strict=True)]
    return torch.cat(split, dim + 1).flatten(dim, dim + 1)


class FusedLinear(nn.Module):
    """Puts the outputs of its parts in one, each part a child under its own name.

    Example:
        >>> layer = FusedLinear({"q": nn.Linear(4, 2), "k": nn.Linear(4, 3)})
        >>> layer(torch.randn(5, 4)).shape
        torch.Size([5, 5])
    """

    def __init__(self, parts: Mapping[str, nn.Module], runs: Sequence[int] = ()) -> None:
        """Take the parts, in the order of their outputs.

        Args:
            parts: the maps, by name.
            runs: adjacent outputs of each part, where they alternate; else they are concatenated.
        """
        super().__init__()
        self.parts, self.runs = tuple(parts), tuple(runs)
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def out_features(self) -> int:
        """Rows of all parts."""
        return sum(getattr(self, name).out_features for name in self.parts)

    @property
    def in_features(self) -> int:
        """Columns, which all parts share."""
        width: int = getattr(self, self.parts[0]).in_features
        return width

    def forward(self, x: Tensor) -> Tensor:
        """Apply every part to ``(..., in)``."""
        return joined([self.get_submodule(name)(x) for name in self.parts], self.runs)

    def to_dense(self) -> Tensor:
        """Return the ``(out, in)`` weight of the whole."""
        return joined([getattr(self, name).weight for name in self.parts], self.runs, 0)

    @property
    def weight(self) -> Tensor:
        """The dense ``(out, in)`` weight; rebuilt at every access."""
        return self.to_dense()
