"""An embedding whose table is a network."""

from __future__ import annotations

from typing import Any

from torch import nn

from tnlm.checkpoint.kinds.base import (
    Entry,
    MatrixKind,
    Place,
    check_network,
    network_of,
    trained,
)
from tnlm.layers.embedding import FactorizedEmbedding


class Embedding(MatrixKind):
    """A table as a network, with its padding row."""

    name = "embedding"
    table = True

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Check the bias and the network."""
        super().check_part(entry, biased)
        check_network(entry, "embedding")

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a `FactorizedEmbedding`."""
        table = FactorizedEmbedding(network_of(entry), **place.tensors)
        table.padding_idx = entry["padding_idx"]
        return table

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return an embedding of the whole table."""
        weight = module.to_dense().detach()
        rows, columns = weight.shape
        padding, frozen = entry["padding_idx"], not trained(module)
        return nn.Embedding(rows, columns, padding_idx=padding, _weight=weight, _freeze=frozen)


KIND = Embedding()
