"""Checks of a model before it is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.layers.peft_names import is_adapter
from tnlm.targets.base import Target
from tnlm.targets.dropping import only_dropped
from tnlm.utils.residency import resident


def check_weights(model: PreTrainedModel, targets: Sequence[Target]) -> None:
    """Raise `ModelError` if a target is empty, on the meta device, quantized, or not finite."""
    for target in targets:
        for held in target.held(model):
            check_plain(target.name, held)
        with resident(model, *(member.module for member in target.members)):
            for values in target.values(model):
                _check_finite(target, values.detach())


def check_plain(name: str, held: Tensor) -> None:
    """Raise `ModelError` if a weight is no ordinary tensor, on the meta device, or quantized."""
    if type(held) not in (nn.Parameter, Tensor):  # of torchao, or of a distributed model
        raise ModelError(
            f"{name} is a {type(held).__name__} and no plain tensor; load the model "
            "unquantized and on one device"
        )
    weight = held.detach()
    if weight.is_meta:
        raise ModelError(f"{name} has no data (meta device); load the weights first")
    if not weight.is_floating_point() or weight.element_size() == 1:  # of 8 bits
        raise ModelError(f"{name} is {weight.dtype}; load the model unquantized")


def _check_finite(target: Target, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise ModelError(
            f"{target.name} holds {count} NaN or infinite weights; nothing was changed"
        )


def check_model(model: Any) -> None:
    """Raise `ModelError` unless the model is an ordinary Hugging Face model, not yet compressed.

    Experts may have been dropped from it before.
    """
    if not isinstance(model, PreTrainedModel) or hasattr(model, "_orig_mod"):
        raise ModelError(
            f"a transformers PreTrainedModel is wanted, not {type(model).__name__}{_inside(model)}"
        )
    check_bare(model)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "the model's weights were made inside torch.inference_mode(), so that nothing made of "
            "them can be trained or changed; load the model outside of it"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    method = getattr(method, "value", method)
    if method == "tnlm" and only_dropped(model):
        return
    if method == "tnlm":
        raise ModelError(
            "the model is compressed already; start from tnlm.to_dense(model) or the original"
        )
    raise ModelError(
        f"the model is quantized with {method}; load it unquantized, or call model.dequantize() "
        "first (for GGUF: quantization_config=GgufConfig(dequantize=True))"
    )


def _inside(given: Any) -> str:
    """Return what to give instead of something that holds a model, or names one."""
    if isinstance(given, str | Path):
        return "; load it first: AutoModelForCausalLM.from_pretrained(...)"
    if callable(getattr(given, "merge_and_unload", None)):
        return "; merge its adapters first: model = model.merge_and_unload()"
    if hasattr(given, "_orig_mod"):
        return "; a compiled model holds the one that is wanted: give model._orig_mod"
    for name in ("module", "model", "auto_model"):  # DataParallel and its like, a pipeline
        if isinstance(getattr(given, name, None), PreTrainedModel):
            return f"; it holds one: give its .{name}"
    if isinstance(given, nn.Module):
        for name, module in given.named_modules():
            if isinstance(module, PreTrainedModel):  # as in sentence-transformers
                return f"; it holds one: give its get_submodule({name!r})"
    return ""


def check_bare(model: PreTrainedModel) -> None:
    """Raise `ModelError` if modules of a model are wrapped by adapters or by a compiler."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ModelError(
                f"{name} is compiled; put its _orig_mod back, and compile after compressing"
            )
        if is_adapter(module):
            raise ModelError(
                f"{name} has a PEFT adapter: load the adapter by PeftModel.from_pretrained and "
                "call merge_and_unload(), or remove it by model.delete_adapter(...)"
            )
