"""A linear layer whose weight has some rows and columns alone."""

from __future__ import annotations

from torch import nn

from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place, network_of, sizes
from tnlm.decompositions import get_format
from tnlm.errors import CheckpointError
from tnlm.layers.submatrix import SubmatrixLinear


class Submatrix(MatrixKind):
    """A matrix without some rows and columns: its format and how many are kept."""

    name = "submatrix"
    partial = True

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Check the bias and the numbers of rows and columns."""
        super().check_part(entry, biased)
        structure = get_format(entry["format"])
        if self.name not in structure.kinds:
            raise CheckpointError(f"{entry['format']} cannot replace a {self.name} module")
        network_of(entry)

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a `SubmatrixLinear`."""
        kept = entry["options"]
        return SubmatrixLinear(
            sizes(entry["shape"]),
            kept["rows"],
            kept["columns"],
            bias=entry["bias"],
            **place.tensors,
        )


KIND = Submatrix()
