"""The weight that a factor applies, wherever it is kept and whatever was wrapped around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tnlm.errors import ModelError
from tnlm.layers.arranged import ArrangedLinear


def applied_weight(child: nn.Linear) -> Tensor:
    """Return the weight that a child applies, in memory.

    Raises:
        ModelError: if accelerate keeps it elsewhere, and does not bring it.
    """
    if not hasattr(child, "_hf_hook"):
        return _weight(child)
    from accelerate.utils import align_module_device

    with align_module_device(child):  # an offloaded weight comes for the child's own call only
        weight = _weight(child)
    if weight.is_meta:
        raise ModelError(
            "weights of a layer are offloaded behind several hooks, through which they cannot be "
            "brought; load the model without device_map, or with one that keeps all in memory"
        )
    return weight


def _weight(child: nn.Linear) -> Tensor:
    """Return the weight, where it is; an adapter may have been wrapped around it."""
    plain = type(child) in (nn.Linear, ArrangedLinear)
    if plain and not hasattr(child.weight, "__tensor_flatten__"):  # quantized: through its product
        return child.weight
    like: Tensor = child.weight
    if callable(like):  # packed by torch's dynamic quantization, whose layers take float32
        return _packed(child)
    eye = torch.eye(child.in_features, dtype=like.dtype, device=like.device)
    applied: Tensor = child(eye)
    return applied.T


def _packed(child: nn.Linear) -> Tensor:
    """Return the weight of a layer of `torch.ao.quantization.quantize_dynamic`."""
    packed: Any = child.weight
    weight: Tensor = packed()
    return weight.dequantize()
