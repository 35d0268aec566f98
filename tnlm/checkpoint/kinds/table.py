"""An embedding kept whole, with a table of few bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place


class Table(MatrixKind):
    """A dense table, with its padding row."""

    name = "table"
    table = True

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return an embedding."""
        rows, columns = entry["shape"]
        table = nn.Embedding(1, 1, padding_idx=None, device="meta")
        table.num_embeddings, table.embedding_dim = rows, columns
        table.padding_idx = entry["padding_idx"]
        table.weight = nn.Parameter(place.empty(rows, columns))
        return table

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return an ordinary embedding."""
        plain: nn.Module = module
        return plain


KIND = Table()
