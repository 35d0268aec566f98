"""`FusedLinear`: several maps of one input, side by side, as GPT-2's ``c_attn``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """Concatenates the outputs of its parts, each a child under its own name.

    Example:
        >>> layer = FusedLinear({"q": nn.Linear(4, 2), "k": nn.Linear(4, 3)})
        >>> layer(torch.randn(5, 4)).shape
        torch.Size([5, 5])
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        """Take the parts, in the order of their outputs."""
        super().__init__()
        self.parts = tuple(parts)
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
        return torch.cat([self.get_submodule(name)(x) for name in self.parts], dim=-1)

    def to_dense(self) -> Tensor:
        """Return the stacked ``(out, in)`` weight."""
        return torch.cat([getattr(self, name).weight for name in self.parts])

    @property
    def weight(self) -> Tensor:
        """The dense ``(out, in)`` weight; rebuilt at every access."""
        return self.to_dense()
