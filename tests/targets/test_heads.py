from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import tnlm
from tnlm.targets.attention import attention_layers
from tnlm.targets.heads import attentions, cuttable
from tnlm.targets.selection import select

ATTENTION = r".*self_attn.*"
IDS = torch.arange(24).reshape(2, 12) % 61 + 3
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}
HEADS = tnlm.scheme("modegpt", formats=("heads",))


@pytest.fixture
def cut(tiny_llama):
    """A Llama of which every attention keeps one of its two key/value heads, and its dense twin."""

    def make(**config):
        model = tiny_llama(num_key_value_heads=2, **config)
        dense = copy.deepcopy(model)
        keep = {"targets": ATTENTION, "keep_targets": 0.5}
        return tnlm.compress(model, HEADS, **keep, **DATA), dense

    return make


def linear(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_a_group_is_a_key_head_with_its_query_heads(tiny_llama):
    model = tiny_llama(num_key_value_heads=2)
    first, _ = attentions(model, select(model).targets)
    names = [member.name.rpartition(".")[2] for member in first.members]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (first.shape, first.size, first.count) == ((32, 32), 16, 2)
    assert first.params == sum(member.params for member in first.members)
    assert not attentions(model, select(model, ["q_proj", "o_proj"]).targets)
    assert not attentions(tiny_llama(num_key_value_heads=1), select(model).targets)  # one cannot go


def test_it_costs_what_is_stored_and_computes_what_the_kept_heads_do(cut):
    model, dense = cut()
    decided = tnlm.report(model).plan
    assert {layer.format for layer in decided.layers} == {"heads"}
    before, after = (sum(p.numel() for p in each.parameters()) for each in (dense, model))
    assert before - after == decided.targets_before.params - decided.targets_after.params
    for block, old in zip(model.model.layers, dense.model.layers, strict=True):
        new, attention = block.self_attn, old.self_attn
        kept = [
            head
            for head in range(2)
            if torch.equal(new.k_proj.weight, attention.k_proj.weight.unflatten(0, (2, -1))[head])
        ]
        assert len(kept) == 1
        queries = attention.q_proj.weight.unflatten(0, (2, -1))[kept[0]]
        assert torch.equal(new.q_proj.weight, queries)
        zeros = torch.zeros_like(attention.o_proj.weight)
        zeros.unflatten(1, (2, -1))[:, kept[0]] = new.o_proj.weight.detach()
        with torch.no_grad():
            attention.o_proj.weight.copy_(zeros)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_it_generates_with_a_smaller_cache(cut, cache):
    model, _ = cut()
    chosen = {} if cache == "dynamic" else {"cache_implementation": cache}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with_cache = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options, **chosen)
    without = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options, use_cache=False)
    assert torch.equal(with_cache, without)
    held = model(IDS, use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in held.layers} == {1}


def test_saved_loaded_and_made_dense(cut, tmp_path):
    model, _ = cut()
    loaded = tnlm.load(tnlm.save(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        full = tnlm.to_dense(loaded)
        assert full.model.layers[0].self_attn.k_proj.out_features == 16
        torch.testing.assert_close(full(IDS).logits, model(IDS).logits)


def test_biases_of_heads_are_counted(tiny_llama):
    model = tiny_llama(num_key_value_heads=2, attention_bias=True)
    unit = attentions(model, select(model).targets)[0]
    assert unit.biases == 16 + 8 + 8
    assert unit.saved(16) == unit.params // 2 + unit.biases


def test_what_depends_on_all_heads_keeps_them(tiny_llama, caplog):
    model = tiny_llama(num_key_value_heads=2)
    model.model.layers[0].self_attn.q_norm = nn.LayerNorm(32)  # OLMo 2 has a norm over all heads
    assert [layer.parent for layer in attention_layers(model, linear(model))] == [
        "model.layers.1.self_attn"
    ]

    class Fixed(type(model.model.layers[1].self_attn)):
        """Attention that knows its number of heads."""

        def forward(self, hidden_states, **kwargs):
            self.q_proj(hidden_states).view(*hidden_states.shape[:-1], 4, 8)
            return super().forward(hidden_states, **kwargs)

    model.model.layers[1].self_attn.__class__ = Fixed
    found = attentions(model, select(model).targets)
    with caplog.at_level(logging.INFO, logger="tnlm"):
        assert not cuttable(model, found)
    assert "does not run with fewer groups" in caplog.text
