"""The weight that a factor applies, even if it is offloaded, quantized or wrapped."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tnlm.errors import ModelError
from tnlm.layers.arranged import ArrangedLinear
from tnlm.layers.packed import PackedLinear

PLAIN = (nn.Linear, ArrangedLinear)


def applied_weight(child: nn.Linear) -> Tensor:
    """Return the weight that a child layer applies, in memory.

    Raises:
        ModelError: if accelerate offloads it, and cannot load it here.
    """
    if not hasattr(child, "_hf_hook"):
        return _weight(child)
    from accelerate.utils import align_module_device

    with align_module_device(child):  # offloaded weights are loaded only for the child's own call
        weight = _weight(child)
    if weight.is_meta:
        raise ModelError(
            "weights of a layer are offloaded behind several hooks and cannot be loaded through "
            "them; load the model without device_map, or with one that keeps all weights in memory"
        )
    return weight


def apply_linear(child: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a child layer to ``(..., in)``, and add a bias.

    Calling a module takes longer than a small product, so a plain linear layer that nothing watches
    or replaces is not called: only its weight is used. Replicas of `nn.DataParallel` and modules
    under FSDP hold their weight as another attribute, and are called.

    Example:
        >>> child = nn.Linear(2, 3, bias=False)
        >>> x, bias = torch.ones(1, 2), torch.ones(3)
        >>> torch.equal(apply_linear(child, x, bias), child(x) + bias)
        True
    """
    held = child._parameters
    weight = held.get("weight")
    plain = type(child) in PLAIN and held.get("bias") is None
    if weight is None or not plain or _is_watched(child):
        applied: Tensor = child(x)
        return applied if bias is None else applied + bias.to(applied.dtype)
    if bias is not None and bias.dtype is not weight.dtype:
        bias = bias.to(weight.dtype)
    return F.linear(x, weight, bias)


def _is_watched(child: nn.Linear) -> bool:
    """Return whether something would notice, or replace, a call of the module."""
    return bool(
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        or "forward" in child.__dict__  # as accelerate sets it
        or _has_any_global_hook()
    )


def _weight(child: nn.Linear) -> Tensor:
    """Return the weight; if it is quantized or wrapped by an adapter, as the product with I."""
    plain = type(child) in (nn.Linear, ArrangedLinear, PackedLinear)
    if plain and not hasattr(child.weight, "__tensor_flatten__"):  # not quantized
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
