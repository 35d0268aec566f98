"""A weight may lie in memory by columns; nothing else about the layer changes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tnlm
from tnlm.layers import arranged
from tnlm.layers.arranged import ArrangedLinear, filled, linear
from tnlm.layers.machine import machine

TALL, WIDE = (256, 96), (96, 256)


@pytest.fixture(autouse=True)
def prefers(monkeypatch):
    """Let float32 be read faster by columns, and other dtypes by rows."""

    def priced(dtype, device="cpu"):
        return dataclasses.replace(machine(dtype), column_major=dtype == torch.float32)

    monkeypatch.setattr(arranged, "machine", priced)


def by_columns(layer: nn.Linear) -> bool:
    return layer.weight.stride() == (1, layer.out_features) and not layer.weight.is_contiguous()


@pytest.mark.parametrize("shape", [TALL, WIDE, (8, 4)])
def test_large_tall_weights_lie_by_columns(shape):
    weight = torch.randn(shape)
    layer = filled(weight, torch.randn(shape[0]))
    assert by_columns(layer) == (shape == TALL)
    assert torch.equal(layer.weight, weight)
    x = torch.randn(3, shape[1])
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


def test_another_dtype_is_arranged_anew():
    layer = filled(torch.randn(TALL))
    assert by_columns(layer)
    assert not by_columns(layer.bfloat16())
    assert by_columns(layer.float())


def test_an_order_survives_a_copy_a_step_and_a_state_dict():
    layer = filled(torch.randn(TALL))
    other = copy.deepcopy(layer)
    assert by_columns(other)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    other(torch.randn(2, TALL[1])).sum().backward()
    optimizer.step()
    assert by_columns(other)
    other.load_state_dict(layer.state_dict())
    assert by_columns(other)
    assert torch.equal(other.weight, layer.weight)


def test_quantized_and_absent_weights_are_left_alone():
    linear(*TALL, device="meta").arrange()
    layer = filled(torch.randn(TALL))
    layer.weight = nn.Parameter(torch.ones(TALL, dtype=torch.int8), requires_grad=False)
    layer.arrange()
    assert layer.weight.is_contiguous()


def test_a_saved_model_is_by_rows_and_a_loaded_one_by_columns(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(arranged, "SMALL", 1)
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    expected = [by_columns(m) for m in model.modules() if isinstance(m, ArrangedLinear)]
    assert any(expected)
    tnlm.save(model, tmp_path / "small")
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert all(tensor.is_contiguous() for tensor in stored.values())
    loaded = tnlm.load(tmp_path / "small")
    found = [by_columns(m) for m in loaded.modules() if isinstance(m, ArrangedLinear)]
    assert found == expected
    ids = torch.arange(5)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_whole_dense_model_can_be_arranged(tiny_llama, monkeypatch):
    monkeypatch.setattr(arranged, "SMALL", 1)
    model = tiny_llama(tie_word_embeddings=True).eval()
    ids = torch.arange(5)[None]
    expected = model(ids).logits
    assert tnlm.arrange(model) is model
    torch.testing.assert_close(model(ids).logits, expected)
    layer = model.model.layers[0]
    assert by_columns(layer.mlp.up_proj)
    assert not by_columns(layer.mlp.down_proj)
    assert model.lm_head.weight.is_contiguous()  # shared with the embedding, which reads rows
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tnlm.arrange(model.bfloat16())
    assert not by_columns(layer.mlp.up_proj)
