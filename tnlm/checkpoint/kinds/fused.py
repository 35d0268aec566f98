"""Several matrices side by side in one module, each with its own entry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnlm.checkpoint.kinds import KINDS
from tnlm.checkpoint.kinds.base import Device, Entry, MatrixKind, plain, trained
from tnlm.errors import CheckpointError
from tnlm.layers.fused import FusedLinear


class Fused(MatrixKind):
    """A list of ``parts``: entries of matrices, each with a ``name``."""

    name = "fused"

    def shape(self, entry: Entry) -> tuple[int, int]:
        """Return the shape of all parts together."""
        parts = entry["parts"]
        shapes = [_kind(part).shape(part) for part in parts]
        widths, names = {columns for _, columns in shapes}, {part.get("name") for part in parts}
        if len(widths) != 1 or len(names) != len(parts):
            raise CheckpointError("its parts must have one width and different names")
        return sum(rows for rows, _ in shapes), widths.pop()

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Check every part."""
        for part in entry["parts"]:
            _kind(part).check_part(part, biased)

    def build(
        self,
        entry: Entry,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        old: nn.Module | None = None,
    ) -> nn.Module:
        """Return a `FusedLinear` of the parts."""
        return FusedLinear(
            {
                part["name"]: _kind(part).build(part, device=device, dtype=dtype)
                for part in entry["parts"]
            }
        )

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return one layer with the weights of all parts, one below the other."""
        parts: list[Any] = [
            _kind(part).dense({**part, "conv1d": False}, getattr(module, part["name"]))
            for part in entry["parts"]
        ]
        weight = torch.cat([part.weight.detach() for part in parts])
        bias = _joined([part.bias for part in parts])
        return plain(entry, weight, bias, trained(module))


def _kind(part: Entry) -> MatrixKind:
    kind = KINDS.get(part["kind"])
    if not isinstance(kind, MatrixKind) or not kind.partial:
        raise CheckpointError(f"kind={part['kind']!r} cannot be one of several parts")
    return kind


def _joined(biases: list[Tensor | None]) -> nn.Parameter | None:
    found = [bias for bias in biases if bias is not None]
    if len(found) < len(biases):
        return None
    learns = any(bias.requires_grad for bias in found)
    return nn.Parameter(torch.cat([bias.detach() for bias in found]), requires_grad=learns)


KIND = Fused()
