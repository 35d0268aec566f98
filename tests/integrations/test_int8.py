"""torchao's int8 weights on the factors of a compressed model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tnlm
from tnlm.errors import ModelError

torchao = pytest.importorskip("torchao.quantization")

IDS = torch.arange(24).reshape(2, 12) % 61 + 3


@pytest.mark.parametrize("scheme", ["svd", "kron", "tucker", "tt", "btt", "modegpt"])
def test_int8_factors_stay_near(scheme, compressed):
    model = compressed("llama", scheme)
    with torch.no_grad():
        before = model(IDS).logits
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        after = model(IDS).logits
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert {type(module.weight.data).__name__ for module in linears} == {"Int8Tensor"}
    # Half a step of max/127 a number is 0.4 % of the largest; errors of the layers add up.
    assert 0 < float((after - before).norm()) <= 0.03 * float(before.norm())


def test_int8_is_a_quarter_of_the_bytes_and_generates(compressed):
    model = compressed("llama", "svd")
    sizes = [stored(model)]
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    sizes.append(stored(model))
    assert sizes[1] <= 0.5 * sizes[0]  # a scale for every row of a tiny factor weighs much
    made = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert made.shape == (1, 16)


def test_int8_models_are_not_saved(compressed, tmp_path):
    model = compressed("llama", "svd")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ModelError, match=r"q_proj.right.weight is a Int8Tensor.*after"):
        tnlm.save(model, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def stored(model):
    """Bytes of what stands in the linear layers."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.data
            inner = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
            parts = [getattr(weight, name) for name in inner] or [weight]
            total += sum(part.numel() * part.element_size() for part in parts)
    return total
