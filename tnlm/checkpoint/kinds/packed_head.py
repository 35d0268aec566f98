"""An output head that shares the packed table of the input embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place
from tnlm.errors import CheckpointError
from tnlm.layers.packed import PackedEmbedding, PackedHead

if TYPE_CHECKING:  # whose import imports the plug-in, and that this file
    from transformers import PreTrainedModel


class PackedTiedHead(MatrixKind):
    """A tied head: its shape, and whether it has a bias of its own."""

    name = "packed-head"

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a `PackedHead`."""
        bias = nn.Parameter(place.empty(entry["shape"][0])) if entry["bias"] else None
        return PackedHead(bias)

    def link(self, model: PreTrainedModel, module: nn.Module) -> None:
        """Let the head read the model's input embedding.

        Raises:
            CheckpointError: if that is not packed.
        """
        table, head = model.get_input_embeddings(), module
        if not isinstance(table, PackedEmbedding) or not isinstance(head, PackedHead):
            raise CheckpointError("config.json has a packed head beside an embedding that is not")
        head.share(table)

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return a linear layer with the table as its weight."""
        return super().dense(entry, _Whole(module))


class _Whole:
    """A head whose weight can be asked for as a factorized layer's."""

    def __init__(self, head: PackedHead) -> None:
        self.to_dense, self.bias = (lambda: head.weight), head.bias
        self.named_parameters = head.named_parameters


KIND = PackedTiedHead()
