"""A linear layer without some rows or columns, such as dropped feed-forward channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place, by, plain, sizes, trained
from tnlm.errors import CheckpointError
from tnlm.layers.arranged import linear


class Sliced(MatrixKind):
    """A smaller matrix: its ``shape``, the ``full`` shape, and the side that is ``cut``.

    Rows may be several equal ``slabs``, such as concatenated gates and values, cut alike.
    """

    name = "sliced"
    partial = True

    def shape(self, entry: Entry) -> tuple[int, int]:
        """Return the original shape of the matrix."""
        shape, full = sizes(entry["shape"]), sizes(entry["full"])
        axis = {"rows": 0, "columns": 1}[entry["cut"]]
        if shape[axis] > full[axis] or shape[1 - axis] != full[1 - axis]:
            raise CheckpointError(f"{by(shape)} is not {by(full)} with fewer {entry['cut']}")
        parts = entry.get("slabs", 1)
        if type(parts) is not int or parts < 1 or shape[0] % parts or full[0] % parts:
            raise CheckpointError(f"slabs={parts!r} do not divide {shape[0]} of {full[0]} rows")
        return full

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a linear layer of the smaller shape."""
        rows, columns = entry["shape"]
        return linear(rows, columns, bias=entry["bias"], **place.tensors)

    def small(self, entry: Entry, module: Any) -> nn.Module:
        """Return an ordinary layer of the smaller shape."""
        return plain(entry, self.weight(module), module.bias, trained(module))

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return a layer of the full size, with zeros for dropped channels."""
        rows, columns = entry["full"]
        parts, cut = entry.get("slabs", 1), self.weight(module)
        weight = _padded(cut, rows, columns, parts)
        bias = None
        if module.bias is not None and entry["cut"] == "columns":
            bias = module.bias
        elif module.bias is not None:
            padded = _padded(module.bias.unsqueeze(1), rows, 1, parts).squeeze(1)
            bias = nn.Parameter(padded, requires_grad=module.bias.requires_grad)
        return plain(entry, weight, bias, trained(module))

    def weight(self, module: Any) -> Tensor:
        """Return the smaller matrix of a module."""
        weight: Tensor = module.weight.detach()
        return weight


def _padded(small: Tensor, rows: int, columns: int, parts: int) -> Tensor:
    """Return a matrix with zeros at the end of its columns, and of the rows of each part."""
    full = small.new_zeros(parts, rows // parts, columns)
    full[:, : len(small) // parts, : small.shape[1]] = small.detach().unflatten(0, (parts, -1))
    return full.flatten(0, 1)


KIND = Sliced()
