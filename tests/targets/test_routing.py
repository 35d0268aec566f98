"""Routers and experts: found beside one another, and tried with fewer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tnlm.targets.routing import find_mixture, stacks_of_experts

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
DEEPSEEK = {"n_routed_experts": 8, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
DEEPSEEK |= {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
DEEPSEEK |= {"qk_nope_head_dim": 4, "v_head_dim": 8}
QWEN = {"num_experts": 8, "moe_intermediate_size": 12}
KINDS = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {**QWEN, "head_dim": 8},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 12},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8},
    "deepseek_v3": {**DEEPSEEK, "n_group": 1, "topk_group": 1},
}


def mixture(kind: str, seed: int = 0, **config):
    """Make a tiny mixture whose weights are large enough to matter."""
    torch.manual_seed(seed)
    asked = type(AutoConfig.for_model(kind))(**SIZES | KINDS[kind] | config)
    model = AutoModelForCausalLM.from_config(asked).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dim() > 1:
            nn.init.normal_(tensor, std=0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_routers_of_many_models_are_found(kind):
    model = mixture(kind)
    [*_, (name, count)] = stacks_of_experts(model)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = find_mixture(model, name, count)
    assert (found.count, found.active, found.path) == (8, 2, name)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_correction_of_scores_is_cut_with_its_experts():
    model = mixture("deepseek_v3")
    [(name, count)] = stacks_of_experts(model)
    model.get_submodule(name.replace("experts", "gate")).e_score_correction_bias.normal_()
    assert find_mixture(model, name, count).router == "gate"


def test_a_router_that_chooses_groups_first_is_refused():
    model = mixture("deepseek_v3", n_group=4, topk_group=2)
    [(name, count)] = stacks_of_experts(model)
    assert "cannot be tried with fewer experts" in find_mixture(model, name, count)


def test_a_router_whose_choice_depends_on_others_is_refused():
    model = mixture("mixtral", num_hidden_layers=1)
    [(name, count)] = stacks_of_experts(model)
    gate = model.get_submodule(name.replace("experts", "gate"))
    plain = gate.forward

    class Shy(type(gate)):
        def forward(self, states):
            logits, weights, index = super().forward(states)
            return logits, weights * len(self.weight), index

    gate.__class__ = Shy
    assert find_mixture(model, name, count) == "its router chooses differently among fewer experts"
    gate.__class__ = type(gate).__bases__[0]
    assert gate.forward == plain
    assert find_mixture(model, name, count).active == 2


def test_all_experts_for_every_token_leave_none_to_drop():
    model = mixture("mixtral", num_experts_per_tok=8)
    [(name, count), *_] = stacks_of_experts(model)
    assert find_mixture(model, name, count) == "every token uses all experts"


def test_experts_without_a_router_are_refused():
    model = mixture("mixtral", num_hidden_layers=1)
    [(name, count)] = stacks_of_experts(model)
    block = model.get_submodule(name.rpartition(".")[0])
    del block.gate
    assert "no router" in find_mixture(model, name, count)


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            type(AutoConfig.for_model("mixtral"))(**SIZES | KINDS["mixtral"])
        )
    [(name, count), *_] = stacks_of_experts(model)
    assert find_mixture(model, name, count) == "its router has no weights to try"
