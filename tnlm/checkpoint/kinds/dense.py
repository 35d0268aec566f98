"""A linear layer kept dense: a part of a fused module, or one with an added bias."""

from __future__ import annotations

from typing import Any

from torch import nn

from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place, plain, trained
from tnlm.layers.arranged import linear


class Dense(MatrixKind):
    """A dense matrix."""

    name = "dense"
    partial = True

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a linear layer."""
        rows, columns = entry["shape"]
        return linear(rows, columns, bias=entry["bias"], **place.tensors)

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return an ordinary layer with the same weight."""
        return plain(entry, module.weight.detach(), module.bias, trained(module))


KIND = Dense()
