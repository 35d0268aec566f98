from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import GPT2ForSequenceClassification

from tnlm.errors import ModelError, OptionError, RankError, TargetError
from tnlm.layers.adapters import Lora, attach, attached, size_of

MODULES = {
    "llama": ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
    "bert": ["encoder.layer.1.attention.self.query"],
}
IDS = torch.arange(3, 19)[None]


def snapshot(model):
    return {name: (id(t), t.clone(), t.requires_grad) for name, t in model.named_parameters()}


def same(before, model):
    now = dict(model.named_parameters())
    return before.keys() == now.keys() and all(
        id(now[name]) == key and torch.equal(now[name], value) and now[name].requires_grad == free
        for name, (key, value, free) in before.items()
    )


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("fails", [False, True])
def test_a_model_comes_back_as_it_was(kind, fails, make_model):
    model = make_model(kind)
    model.get_submodule(MODULES[kind][0]).weight.requires_grad_(False)
    before, kinds = snapshot(model), [type(m) for m in model.modules()]
    try:
        with attached(model, dict.fromkeys(MODULES[kind], 2), scaling=1.0) as adapters:
            assert list(adapters) == MODULES[kind]
            free = [p for p in model.parameters() if p.requires_grad]
            assert {id(p) for p in free} == {id(p) for a in adapters.values() for p in (a.A, a.B)}
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(before, model)
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", MODULES)
def test_the_merged_weight_does_what_the_module_and_its_lora_do(kind, make_model):
    model = make_model(kind)
    module = model.get_submodule(MODULES[kind][0])
    x = torch.randn(3, size_of(module)[1], generator=torch.Generator().manual_seed(1))
    with attached(model, {MODULES[kind][0]: 3}, scaling=0.5) as adapters, torch.no_grad():
        adapter = adapters[MODULES[kind][0]]
        adapter.B.normal_(generator=torch.Generator().manual_seed(2))
        wanted = model.get_submodule(MODULES[kind][0])(x)
    bias = 0 if module.bias is None else module.bias
    torch.testing.assert_close(x @ adapter.merged().T + bias, wanted)


@pytest.mark.parametrize("kind", MODULES)
def test_the_start_changes_nothing_and_the_lora_is_its_product(kind, make_model):
    model = make_model(kind)
    module = model.get_submodule(MODULES[kind][0])
    x = torch.randn(3, size_of(module)[1], generator=torch.Generator().manual_seed(1))
    plain = module(x)
    with attached(model, {MODULES[kind][0]: 3}, scaling=0.5) as adapters, torch.no_grad():
        wrapped, adapter = model.get_submodule(MODULES[kind][0]), adapters[MODULES[kind][0]]
        assert torch.equal(wrapped(x), plain)
        torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(3))
        adapter.fill(Lora(adapter.A * 2, torch.ones_like(adapter.B), 0.5))
        change = wrapped(x) - plain
        delta = adapter.lora().delta()
    torch.testing.assert_close(change, (x.double() @ delta.T).float())


def test_a_half_precision_base_has_a_lora_in_float32(make_model):
    model = make_model("llama").bfloat16()
    with attached(model, {MODULES["llama"][0]: 2}, scaling=1.0) as adapters:
        assert adapters[MODULES["llama"][0]].A.dtype == torch.float32
        assert model(IDS).logits.dtype == torch.bfloat16


def test_the_seed_draws_and_the_global_state_stays(make_model):
    def rows(seed):
        with attached(make_model("llama"), {MODULES["llama"][0]: 2}, 1.0, seed) as adapters:
            return adapters[MODULES["llama"][0]].lora().A

    state = torch.get_rng_state()
    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))
    make_model("llama")  # seeds the global state
    state = torch.get_rng_state()
    with attached(
        nn.Sequential(nn.Linear(2, 2, device="meta").to_empty(device="cpu")), {"0": 1}, 1.0
    ):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_linear_and_conv1d_together_do_not_warn(tiny_gpt2):
    model = GPT2ForSequenceClassification(tiny_gpt2(pad_token_id=0).config)
    with attached(model, {"score": 2, MODULES["gpt2"][0]: 2}, 1.0) as adapters:
        assert adapters["score"].B.shape == (2, 2)
        assert adapters[MODULES["gpt2"][0]].B.shape == (96, 2)


def test_what_cannot_be_is_refused_before_anything_changes(make_model, monkeypatch):
    model, name = make_model("llama"), MODULES["llama"][0]
    before = snapshot(model)
    for ranks, error, text in (
        ({name: 17}, RankError, f"rank=17 at {name}; allowed: 1 to 16"),
        ({name: 0}, RankError, "rank=0"),
        ({name: True}, RankError, "rank=True"),
        ({"model.nothing": 2}, TargetError, "'model.nothing'"),
        ({}, TargetError, "none was given"),
    ):
        with pytest.raises(error, match=text), attached(model, ranks, 1.0):
            pass
        assert same(before, model)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(OptionError, match=r"pip install 'tnlm\[train\]'"):
            attach(model, {name: 2}, 1.0)
    attach(model, {name: 2}, 1.0)
    with pytest.raises(ModelError, match="already has adapters"):
        attach(model, {name: 2}, 1.0)
