"""A linear layer whose weight is a network."""

from __future__ import annotations

from torch import nn

from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place, check_network, network_of
from tnlm.layers.linear import FactorizedLinear


class Linear(MatrixKind):
    """A matrix as a network: its format and options, and the order of its factors."""

    name = "linear"
    partial = True

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Check the bias and the network."""
        super().check_part(entry, biased)
        check_network(entry, "linear")

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a `FactorizedLinear`."""
        network, order = network_of(entry), entry["order"]
        return FactorizedLinear(network, bias=entry["bias"], order=order, **place.tensors)


KIND = Linear()
