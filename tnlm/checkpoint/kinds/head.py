"""An output head that shares the factors of an embedding."""

from __future__ import annotations

from torch import nn

from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place, check_network, network_of
from tnlm.layers.embedding import FactorizedHead


class Head(MatrixKind):
    """A tied head: the entry of its table, and its own bias."""

    name = "head"

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Check the bias and the network."""
        super().check_part(entry, biased)
        check_network(entry, "embedding")

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a `FactorizedHead`."""
        bias = entry["bias"]
        return FactorizedHead(network_of(entry), bias=bias, **place.tensors)


KIND = Head()
