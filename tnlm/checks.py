"""What a model must be before it is worked on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.targets import Target


def check_weights(model: PreTrainedModel, targets: Sequence[Target]) -> None:
    """Raise `ModelError` if a target is empty, on the meta device, quantized, or not finite."""
    for target in targets:
        held = model.get_submodule(target.module).weight
        if type(held) not in (nn.Parameter, Tensor):  # of torchao, or of a distributed model
            raise ModelError(
                f"{target.name} is a {type(held).__name__} and no plain tensor; load the model "
                "unquantized and on one device"
            )
        weight = target.weight(model)
        if weight.is_meta:
            raise ModelError(f"{target.name} has no data (meta device); load the weights first")
        if not weight.is_floating_point():
            raise ModelError(f"{target.name} is {weight.dtype}; load the model unquantized")
        if not bool(torch.isfinite(weight).all()):
            count = int((~torch.isfinite(weight)).sum())
            raise ModelError(
                f"{target.name} holds {count} NaN or infinite weights; nothing was changed"
            )


def check_model(model: PreTrainedModel) -> None:
    """Raise `ModelError` unless the model is an ordinary, uncompressed Hugging Face model."""
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"a transformers PreTrainedModel is wanted, not {type(model).__name__}")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    method = getattr(method, "value", method)
    if method == "tnlm":
        raise ModelError(
            "the model is compressed already; start from tnlm.to_dense(model) or the original"
        )
    raise ModelError(
        f"the model is quantized with {method}; load it unquantized, or call model.dequantize() "
        "first (for GGUF: quantization_config=GgufConfig(dequantize=True))"
    )
