"""Mixtures of experts: what is compressed, what is left, and that the report says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import tnlm
from tnlm.targets.selection import select

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
}
KINDS = {
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 48,
    },
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
}
TABLE = re.compile(r"^\| ([\w-]+) \| .* \| (0\.\d+) \|$", re.M)
IDS = torch.arange(64).reshape(4, 16)


def make(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **KINDS[kind])
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts_are_left_and_named(kind):
    found = select(make(kind))
    assert not any(".experts." in target.name for target in found.targets)
    assert {target.name.rpartition(".")[2] for target in found.targets} >= {"q_proj", "o_proj"}
    assert found.skipped == {
        f"model.layers.{index}.mlp.experts.{name}": (
            "a 3-D parameter; only modules whose weight is a matrix are replaced"
        )
        for index in range(2)
        for name in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_guide_says_how_much_is_left(kind):
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "experts.md").read_text()
    written = {row[1].replace("-", "").lower(): row[2] for row in TABLE.finditer(guide)}
    sizes = {name: p.numel() for name, p in make(kind).named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert written[kind.lower()] == f"{experts / sum(sizes.values()):.2f}"


def test_a_shared_expert_is_compressed():
    names = {target.name.partition(".mlp.")[2] for target in select(make("Qwen2Moe")).targets}
    assert names >= {f"shared_expert.{part}_proj" for part in ("gate", "up", "down")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["svd-llm", "auto"])
def test_the_rest_is_compressed_saved_and_trained(kind, scheme, tmp_path):
    model = tnlm.compress(
        make(kind), scheme, keep_targets=0.6, calibration=IDS, max_length=16, progress=False
    )
    report = tnlm.report(model)
    assert report.plan.targets_after.params <= 0.6 * report.plan.targets_before.params
    assert "experts" in report.to_json()
    tnlm.save(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts." in name)
