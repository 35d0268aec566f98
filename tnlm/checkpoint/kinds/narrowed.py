"""A linear layer without some rows or columns, whose weight is a network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tnlm.checkpoint.kinds.base import Entry, Place, check_network
from tnlm.checkpoint.kinds.linear import KIND as LINEAR
from tnlm.checkpoint.kinds.sliced import Sliced


class Narrowed(Sliced):
    """A smaller matrix, as ``sliced`` has, with the format and options of its network."""

    name = "narrowed"

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Check the bias and the network."""
        super().check_part(entry, biased)
        check_network(entry, "linear")

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a `FactorizedLinear` of the smaller shape."""
        return LINEAR.build(entry, place)

    def weight(self, module: Any) -> Tensor:
        """Return the smaller matrix, factors multiplied."""
        weight: Tensor = module.to_dense().detach()
        return weight


KIND = Narrowed()
