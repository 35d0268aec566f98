"""Every parameter of two or more dimensions is either replaced or listed."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GptOssConfig,
    GptOssForCausalLM,
)

import tnlm
from tests.integrations.families import FAMILIES, make
from tnlm.plans.coverage import KEPT


def matrices(model):
    """Return the parameters of two or more dimensions, shared ones counted once."""
    return sum(p.numel() for p in set(model.parameters()) if p.dim() > 1)


def replaced(plan):
    return sum(layer.before.params for layer in plan.layers if layer.format is not None)


def by_kind(plan):
    found = {}
    for each in plan.coverage.left:
        found.setdefault(each.kind, set()).add(each.name)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_without_a_word(family):
    model = make(family)
    plan = tnlm.plan(model, "svd", keep_targets=0.5, progress=False)
    left = sum(each.params for each in plan.coverage.left)
    assert replaced(plan) + left == matrices(model)
    assert all(each.reason for each in plan.coverage.left)


@pytest.mark.parametrize("asked", [{}, {"targets": ["q_proj"]}, {"ignore": ["mlp.down_proj"]}])
def test_it_is_listed_whatever_was_chosen(asked, tiny_llama):
    model = tiny_llama()
    plan = tnlm.plan(model, "svd", keep_targets=0.5, **asked)
    assert replaced(plan) + sum(each.params for each in plan.coverage.left) == matrices(model)
    kinds = by_kind(plan)
    assert kinds.pop("embedding") == {"model.embed_tokens.weight"}
    assert kinds.pop("head") == {"lm_head.weight"}
    if asked == {}:
        assert kinds == {}
    elif "ignore" in asked:
        assert kinds == {"ignored": {"model.layers.*.mlp.down_proj.weight"}}
    else:
        assert "model.layers.*.self_attn.k_proj.weight" in kinds.pop("not chosen")
        assert kinds == {}


def test_block_numbers_are_one_line_with_the_count(tiny_llama):
    plan = tnlm.plan(tiny_llama(), "svd", keep_targets=0.5, ignore=["k_proj"])
    [found] = [each for each in plan.coverage.left if each.kind == "ignored"]
    assert (found.name, found.count) == ("model.layers.*.self_attn.k_proj.weight", 2)
    assert (found.params, found.in_body) == (2 * 32 * 16, True)
    assert found.reason == "ignore= names it"


def test_experts_are_named_as_such(tiny_llama):
    model = tiny_llama()
    for block in model.model.layers:
        block.mlp.experts = nn.Module()
        block.mlp.experts.stacked = nn.Parameter(torch.zeros(4, 8, 32))
    plan = tnlm.plan(model, "svd", keep_targets=0.5)
    [found] = [each for each in plan.coverage.left if each.kind == "experts"]
    assert (found.name, found.count) == ("model.layers.*.mlp.experts.stacked", 2)
    assert plan.coverage.share == pytest.approx(1 - 2 * 1024 / plan.coverage.body)


def test_biases_of_experts_are_listed_as_their_own_model_holds_them():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = GptOssForCausalLM(GptOssConfig(vocab_size=64, num_experts_per_tok=2, **sizes))
    before = matrices(model)
    plan = tnlm.plan(model, "svd", keep_targets=0.5)
    assert replaced(plan) + sum(each.params for each in plan.coverage.left) == before
    assert sum(e.params for e in plan.coverage.left if e.reason == "a bias of experts") == 4 * 96
    assert plan.coverage.share > 0.9


def test_convolutions_and_other_parameters_are_named():
    kinds = by_kind(tnlm.plan(make("vit"), "svd", keep_targets=0.5))
    assert kinds["convolution"] == {"vit.embeddings.patch_embeddings.projection.weight"}
    assert kinds["other"] == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}


def test_what_stands_around_the_blocks_is_no_body():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=64, num_attention_heads=4, **sizes)
    plan = tnlm.plan(BertForSequenceClassification(config), "svd", keep_targets=0.5)
    assert by_kind(plan)["around the blocks"] == {"bert.pooler.dense.weight", "classifier.weight"}
    assert plan.coverage.share == 1.0


def test_targets_that_stay_dense_are_listed_with_the_note(tiny_llama):
    plan = tnlm.plan(tiny_llama(), "svd", keep_targets=0.07)  # too little for k and v, 16x32
    [reason] = {each.reason for each in plan.coverage.left if each.kind == KEPT}
    assert {layer.note for layer in plan.layers if layer.format is None} == {reason}
    assert plan.coverage.share == 1.0


def test_a_part_of_a_fused_module_that_stays_dense_is_listed(make_model):
    model = make_model("gpt2")
    plan = tnlm.plan(model, "svd", keep_targets=0.5, targets=["c_attn.q", "c_attn"])
    layers = [
        layer if not layer.name.endswith(".k") else type(layer)(
            layer.name, layer.kind, layer.shape, None, {}, layer.before, layer.before, note="kept"
        )
        for layer in plan.layers
    ]  # fmt: skip
    again = type(plan)(plan.scheme, plan.metric, plan.request, tuple(layers), plan.model)
    done = tnlm.report(tnlm.compress(model, again)).plan
    [found] = [each for each in done.coverage.left if each.kind == KEPT]
    assert (found.count, found.params, found.reason) == (2, 2 * 32 * 32, "kept")


def test_what_the_data_does_not_reach_is_passed_over(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.extra = nn.Linear(32, 32)
    ids = torch.arange(64) % 61
    done = tnlm.compress(model, "svd-llm", keep_targets=0.5, calibration=ids, max_length=16)
    [found] = [e for e in tnlm.report(done).plan.coverage.left if e.kind == "passed over"]
    assert found.name == "model.layers.*.mlp.extra.weight"
    assert "never reaches" in found.reason


def test_much_of_the_body_outside_is_warned_of(tiny_llama, caplog):
    with caplog.at_level(logging.WARNING, "tnlm"):
        tnlm.plan(tiny_llama(), "svd", keep_targets=0.5)
        assert "outside the targets" not in caplog.text
        tnlm.compress(tiny_llama(), "svd", keep_targets=0.5, targets=["q_proj"])
    assert "87% of the parameters in the model's blocks are outside the targets" in caplog.text


def test_parametrized_weights_belong_to_their_module(tiny_llama):
    model = tiny_llama()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    plan = tnlm.plan(model, "svd", keep_targets=0.5)
    [found] = [e for e in plan.coverage.left if e.kind == "passed over" and e.params > 48]
    assert "computes its weight" in found.reason
