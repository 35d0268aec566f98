"""Multiply-adds of mixtures: a token meets k of E experts, in whatever way they are held."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import tnlm
from tnlm.allocation.pricing import model_cost
from tnlm.targets.selection import select

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2}
D, F = 16, 24
ATTENTION, HEAD = 2 * 4 * D * D, 64 * D


def mixtral():
    config = MixtralConfig(**SIZES, intermediate_size=F, num_local_experts=8, num_experts_per_tok=2)
    return MixtralForCausalLM(config), ATTENTION + HEAD + 2 * 2 * 3 * D * F


def qwen():
    config = Qwen2MoeConfig(
        **SIZES, intermediate_size=40, moe_intermediate_size=F, num_experts=6,
        num_experts_per_tok=3, shared_expert_intermediate_size=10, mlp_only_layers=[0],
    )  # fmt: skip
    experts = 3 * 3 * D * F + 3 * D * 10 + D  # with the shared expert and its gate
    return Qwen2MoeForCausalLM(config), ATTENTION + HEAD + 3 * D * 40 + experts


def oss():
    config = GptOssConfig(
        **SIZES, head_dim=8, intermediate_size=F, num_local_experts=4, num_experts_per_tok=1
    )
    return GptOssForCausalLM(config), ATTENTION + HEAD + 2 * 3 * D * F


def deepseek():
    config = DeepseekV3Config(
        **SIZES, intermediate_size=40, moe_intermediate_size=F, n_routed_experts=8, n_group=1,
        topk_group=1, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    attention = 2 * (D * 16 + D * (8 + 4) + 8 * 2 * (4 + 8) + 16 * D)
    return DeepseekV3ForCausalLM(config), attention + HEAD + 3 * D * 40 + (2 + 1) * 3 * D * F


def granite_shared():
    config = GraniteMoeSharedConfig(
        **SIZES, intermediate_size=F, num_local_experts=4, num_experts_per_tok=1,
        shared_intermediate_size=10,
    )  # fmt: skip
    return GraniteMoeSharedForCausalLM(config), ATTENTION + HEAD + 2 * 3 * D * (F + 10)


@pytest.mark.parametrize("make", [mixtral, qwen, oss, deepseek, granite_shared])
def test_stacked_experts(make):
    model, expected = make()
    assert model_cost(model).macs == expected
    assert model_cost(model).params == sum(p.numel() for p in model.parameters())


SPARSE = {"num_experts": 4}


def switch():
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=D, d_kv=8, d_ff=F, num_heads=2, num_layers=2, num_decoder_layers=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, **SPARSE,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config), 1 / 4


def nllb():
    sides = ("encoder", "decoder")
    sizes = {f"{side}_layers": 2 for side in sides} | {f"{side}_ffn_dim": F for side in sides}
    sizes |= {f"{side}_attention_heads": 2 for side in sides}
    sizes |= {f"{side}_sparse_step": 2 for side in sides}
    config = NllbMoeConfig(vocab_size=64, d_model=D, **sizes, **SPARSE)
    return NllbMoeForConditionalGeneration(config), 2 / 4


@pytest.mark.parametrize("make", [switch, nllb])
def test_experts_that_are_modules_cost_their_share_before_and_after(make):
    model, share = make()
    targets = select(model).targets
    experts = [t for t in targets if ".experts." in t.name]
    assert experts
    assert {t.share for t in experts} == {share}
    assert {t.share for t in targets if t not in experts} == {1.0}
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    dense = sum(m.weight.numel() for m in linear)
    assert model_cost(model).macs == dense - (1 - share) * sum(t.params for t in experts)
    decided = tnlm.plan(model, "svd", keep_targets=0.5)
    layers = {layer.name: layer for layer in decided.layers}
    layer, target = layers[experts[0].name], experts[0]
    assert layer.before.macs == target.params * share
    assert layer.after.macs < layer.before.macs
    assert 0 < decided.model_after.macs < decided.model.macs
    cut = tnlm.plan(model, "svd", keep=0.8, unit="macs")
    assert cut.model_after.macs <= 0.8 * cut.model.macs


def test_unknown_numbers_of_experts_count_in_full():
    model = mixtral()[0]
    every = model_cost(model).macs + 2 * 6 * 3 * D * F
    vars(model.config)["num_experts_per_tok"] = None
    assert model_cost(model).macs == every
    vars(model.config)["num_experts_per_tok"] = [2, 4]  # by layer
    assert model_cost(model).macs == ATTENTION + HEAD + 2 * 3 * 3 * D * F
