"""What may be cut out of a layer is decided by trying, on whatever stands between the matrices."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tnlm
from tnlm.errors import ModelError
from tnlm.recovery.pruning.groups import find_groups
from tnlm.recovery.pruning.prune import prune
from tnlm.targets.channels import narrowable, pairs
from tnlm.targets.selection import select
from tnlm.targets.trial import Hidden, Slabs, objection

DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Layer(nn.Module):
    def __init__(self, between, channels=24):
        super().__init__()
        self.up, self.gate = nn.Linear(8, channels), nn.Linear(8, channels)
        self.down, self.between = nn.Linear(channels, 8), between

    def forward(self, x):
        return self.down(self.between(self.gate(x)) * self.up(x))


def channels(count=24):
    return Hidden({"gate": Slabs(), "up": Slabs()}, "down", size=1, count=count)


def gemma3n():
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        **SIZES, intermediate_size=48, vocab_size_per_layer_input=64, head_dim=8, laurel_rank=4,
        hidden_size_per_layer_input=8, num_key_value_heads=2, num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.95, 0.0], pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3nForCausalLM(config).eval()


def mean_free(x):
    return x - x.mean(-1, keepdim=True)


def neighbours(x):
    return torch.relu(x) + 0.5 * x.roll(1, -1)


def scaled_by_largest(x):
    return x / x.abs().amax(-1, keepdim=True)


def by_position(x):
    return x * torch.arange(1, x.shape[-1] + 1).to(x)


def strongest(x):
    return torch.where(x >= x.topk(4, -1).values[..., -1:], x, 0.0)


def scaled_by_smallest(x):
    return x / x.abs().amin(-1, keepdim=True)


def weakest(x):
    return torch.where(x.abs() == x.abs().amin(-1, keepdim=True), x, 0.0)


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MIXING = [mean_free, neighbours, scaled_by_largest, scaled_by_smallest, by_position, strongest,
          weakest, nn.Softmax(-1), nn.LayerNorm(24), nn.RMSNorm(24),
          nn.GroupNorm(1, 24, affine=False)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("between", MIXING, ids=lambda f: getattr(f, "__name__", str(f)))
def test_what_mixes_channels_is_found(between, dtype):
    module = between if isinstance(between, nn.Module) else Called(between)
    if isinstance(between, nn.GroupNorm):
        module = Called(lambda x: between(x.flatten(0, 1)).view_as(x))
    assert objection(Layer(module).to(dtype), channels()) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(set(ACT2FN) - {"clippedQuantGELU"}))
def test_every_activation_of_single_channels_passes(name, dtype):
    layer = Layer(ACT2FN[name]).to(dtype)
    assert objection(layer, channels()) is None


def test_hidden_values_that_go_elsewhere_are_found():
    class Leaks(Layer):
        def forward(self, x):
            hidden = self.between(self.gate(x)) * self.up(x)
            return self.down(hidden) + hidden.mean(-1, keepdim=True)

    class Bypasses(Layer):
        def forward(self, x):
            gate = torch.nn.functional.linear(x, self.gate.weight)
            return self.down(self.between(gate) * self.up(x))

    assert "output" in objection(Leaks(nn.GELU()), channels())
    assert "without calling it" in objection(Bypasses(nn.GELU()), channels())


def test_a_layer_that_cannot_be_called_is_refused():
    class Odd(Layer):
        def forward(self, x, table):
            return super().forward(x + table["bias"])

    assert "cannot be tried" in objection(Odd(nn.GELU()), channels())


def test_nothing_is_touched():
    layer = Layer(nn.Sequential(nn.GELU(), nn.Dropout(0.5))).train()
    layer.register_buffer("seen", torch.zeros(1))
    calls = []
    for module in layer.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    before, random = copy.deepcopy(layer.state_dict()), torch.random.get_rng_state()
    assert objection(layer, channels()) is None
    assert not calls
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(module.training for module in layer.modules())
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(module._forward_hooks for module in layer.modules())


def families():
    small = {**SIZES, "max_position_embeddings": 64}
    yield "neox", GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=48)), 2
    yield "opt", OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32)), 2
    yield "bloom", BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2)), 2
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
    for kind in ("relu", "gated-gelu"):
        config = T5Config(vocab_size=64, feed_forward_proj=kind, **sizes)
        yield f"t5-{kind}", T5ForConditionalGeneration(config), 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_models_that_were_narrowed_still_are(dtype, make_model, caplog):
    made = [(kind, make_model(kind), 2) for kind in ("llama", "gpt2")]
    for name, model, count in [*made, *families()]:
        model = model.to(dtype)
        assert len(narrowable(model, pairs(model, select(model).targets))) == count, name
    assert not caplog.records


def test_a_model_whose_activation_mixes_channels_keeps_them(caplog):
    model = gemma3n()
    with caplog.at_level(logging.WARNING, "tnlm"):
        tnlm.compress(model, "modegpt", keep_targets=0.6, **DATA)
    assert "1 of 2 feed-forward layers keep all their channels" in caplog.text
    assert "layers.0.mlp" in caplog.text
    kinds = {layer.name: layer.format for layer in tnlm.report(model).plan.layers}
    assert kinds["model.layers.0.mlp.down_proj"] == "low-rank"
    assert "channels" in kinds.values()


def test_pruning_refuses_channels_that_mix(make_model):
    model = gemma3n()
    names = [target.module for target in select(model).targets]
    with pytest.raises(ModelError, match=r"layers\.0\.mlp: channels cannot be cut.*channels=False"):
        find_groups(model, names, "channels")


def without_mean(module, query, key, value, mask, **options):
    output, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output - output.mean(2, keepdim=True), weights  # over heads


def test_pruning_refuses_heads_that_mix(tiny_llama):
    AttentionInterface.register("without-mean", without_mean)
    model = tiny_llama(head_dim=8, num_key_value_heads=4)
    model.config._attn_implementation = "without-mean"
    ids = torch.arange(3, 35).reshape(1, 32)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn: heads cannot be cut"):
        prune(model, [batch], keep=0.7, steps=2, rank=2, progress=False)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.config._attn_implementation = "sdpa"
    assert prune(model, [batch], keep=0.7, steps=2, rank=2, progress=False) is model
