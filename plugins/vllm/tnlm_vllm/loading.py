"""Room for the tensors of the parts of a layer, which vLLM loads under one name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnlm_vllm.layout import Layer, LayoutError

SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}
"""What vLLM calls the parts of a layer, beside their numbers."""
WHOLE = {"codes": torch.int8, "order": torch.int64}
"""Dtypes of the kinds of tensors that are not weights."""


@dataclass(frozen=True)
class Slot:
    """The place of one part's tensor in a parameter: from ``start``, in a shape."""

    start: int
    shape: tuple[int, ...]


class Slots:
    """One flat parameter for each name, with a slot for every part that has such a tensor.

    Args:
        prefix: the layer's name, for messages.
        layers: descriptions of the parts.
        dtype: of the weights.

    Attributes:
        parameters: by name, each with the ``weight_loader`` that vLLM calls.

    Example:
        >>> from tnlm_vllm.layout import dense
        >>> slots = Slots("qkv_proj", [dense((2, 3)), dense((1, 3))], torch.float32)
        >>> weight = slots.parameters["weight"]
        >>> weight.weight_loader(weight, torch.ones(2, 3), 0)
        >>> weight.weight_loader(weight, torch.zeros(1, 3), 1)
        >>> slots.tensors(1)["weight"].tolist()
        [[0.0, 0.0, 0.0]]
    """

    def __init__(self, prefix: str, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        """Make the parameters."""
        self.prefix, self.layers = prefix, list(layers)
        self.parameters: dict[str, nn.Parameter] = {}
        self._slots: dict[tuple[int, str], Slot] = {}
        self._filled: set[tuple[int, str]] = set()
        sizes: dict[str, int] = {}
        dtypes: dict[str, torch.dtype] = {}
        for part, layer in enumerate(self.layers):
            for name, (shape, kind) in layer.tensors().items():
                self._slots[part, name] = Slot(sizes.get(name, 0), shape)
                sizes[name] = sizes.get(name, 0) + math.prod(shape)
                dtypes[name] = WHOLE.get(kind, dtype)
        for name, size in sizes.items():
            made = nn.Parameter(torch.empty(size, dtype=dtypes[name]), requires_grad=False)
            made.weight_loader = self._loader(name)  # type: ignore[attr-defined]
            self.parameters[name] = made

    def _loader(self, name: str) -> object:
        def load(parameter: Tensor, loaded: Tensor, shard: int | str | None = None) -> None:
            part = SHARDS[shard] if shard is None or isinstance(shard, str) else shard
            slot = self._slots.get((part, name))
            if slot is None or slot.shape != tuple(loaded.shape):
                wanted = "none" if slot is None else slot.shape
                raise LayoutError(
                    f"{self.prefix}: the files have {name} {tuple(loaded.shape)} for part {part}, "
                    f"and config.json {wanted}"
                )
            end = slot.start + math.prod(slot.shape)
            parameter.data[slot.start : end].copy_(loaded.flatten())
            self._filled.add((part, name))

        return load

    def check(self) -> None:
        """Raise `LayoutError` unless every tensor was loaded."""
        missing = sorted(self._slots.keys() - self._filled)
        if missing:
            part, name = missing[0]
            raise LayoutError(f"{self.prefix}: the files lack {name} of part {part}")

    def tensors(self, part: int) -> dict[str, Tensor]:
        """Return the tensors of one part, by name."""
        return {
            name: self.parameters[name]
            .data[slot.start : slot.start + math.prod(slot.shape)]
            .view(slot.shape)
            .clone()
            for (owner, name), slot in self._slots.items()
            if owner == part
        }
