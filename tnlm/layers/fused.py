"""`FusedLinear`: several linear layers of one input in one module, like GPT-2's ``c_attn``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """The order of the rows of several matrices in one module.

    The parts are concatenated, or interleaved in groups: each group has an equal share of every
    part's rows, like the heads in GPT-NeoX's ``query_key_value``.

    Attributes:
        parts: names of the matrices, in order.
        sizes: number of rows of each.
        groups: number of groups; 1 if the parts are concatenated.
    """

    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    groups: int = 1

    @property
    def runs(self) -> tuple[int, ...]:
        """Number of adjacent rows of each part."""
        return tuple(size // self.groups for size in self.sizes)

    def rows(self, part: int) -> slice | Tensor:
        """Return the rows of a part: a slice, or an index if there are several groups.

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
    """Return tensors concatenated, or interleaved in runs of the given lengths.

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
    """Joins the outputs of its parts, each of which is a child under its own name.

    Example:
        >>> layer = FusedLinear({"q": nn.Linear(4, 2), "k": nn.Linear(4, 3)})
        >>> layer(torch.randn(5, 4)).shape
        torch.Size([5, 5])
    """

    def __init__(self, parts: Mapping[str, nn.Module], runs: Sequence[int] = ()) -> None:
        """Store the parts, in the order of their outputs.

        Args:
            parts: the layers, by name.
            runs: adjacent outputs of each part, if the parts' outputs alternate; empty if they are
                concatenated.
        """
        super().__init__()
        self.parts, self.runs = tuple(parts), tuple(runs)
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def out_features(self) -> int:
        """Total number of rows of the parts."""
        return sum(getattr(self, name).out_features for name in self.parts)

    @property
    def in_features(self) -> int:
        """Number of columns of every part."""
        width: int = getattr(self, self.parts[0]).in_features
        return width

    def forward(self, x: Tensor) -> Tensor:
        """Apply every part to ``(..., in)``."""
        return joined([self.get_submodule(name)(x) for name in self.parts], self.runs)

    def to_dense(self) -> Tensor:
        """Return the joint ``(out, in)`` weight."""
        return joined([getattr(self, name).weight for name in self.parts], self.runs, 0)

    @property
    def weight(self) -> Tensor:
        """The dense ``(out, in)`` weight; rebuilt at every access."""
        return self.to_dense()
