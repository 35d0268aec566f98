"""Matrices that the data never reaches stay dense, whatever the scheme."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)

import tnlm
from tnlm.errors import CalibrationError, TargetError

IDS = torch.arange(160) % 57 + 3
DATA = {"calibration": IDS, "num_samples": 6, "max_length": 16, "gradient_samples": 3}
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"intermediate_size": 24, "num_attention_heads": 2}


def mamba():
    return MambaForCausalLM(MambaConfig(**SMALL, state_size=4, time_step_rank=8))


def llava():
    text = LlamaConfig(**SMALL, **HEADS)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(
        text_config=text, vision_config=CLIPVisionConfig(**sizes, **HEADS), image_token_index=63
    )
    config.use_cache = False
    return LlavaForConditionalGeneration(config)


def experts():
    layers = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)}
    layers |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    layers |= {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
    layers |= {f"{side}_sparse_step": 2 for side in ("encoder", "decoder")}
    return NllbMoeForConditionalGeneration(
        NllbMoeConfig(vocab_size=64, d_model=16, num_experts=8, **layers)
    )


UNREACHED = {
    "mamba": (mamba, "dt_proj"),
    "llava": (llava, "vision_tower"),
    "experts": (experts, "experts"),
}


@pytest.fixture(scope="module")
def make():
    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = UNREACHED[kind][0]().eval()
        return copy.deepcopy(made[kind])

    return get


CASES = [
    (kind, scheme)
    for kind in UNREACHED
    for scheme in ("svd-llm", "fwsvd", "aa-svd", "auto", "lora-svd")
    if (kind, scheme) not in [("experts", "aa-svd"), ("mamba", "lora-svd")]
]


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_they_stay_dense_with_one_warning_and_a_line(make, kind, scheme, caplog, tmp_path):
    model, word = make(kind), UNREACHED[kind][1]
    with caplog.at_level(logging.WARNING, logger="tnlm"):
        tnlm.compress(model, scheme, keep_targets=0.6, progress=False, **DATA)
    warned = [r.getMessage() for r in caplog.records if "stay dense, as" in r.getMessage()]
    assert len(warned) == 1
    assert word in warned[0]
    plan = tnlm.report(model).plan
    left = [name for name, reason in plan.skipped.items() if "never reaches" in reason]
    assert left
    assert not any("language_model" in name for name in left)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in left)
    fitted = {name for layer in plan.layers for name in layer.name.split("+")}
    assert fitted
    assert not fitted & set(left)
    assert f"skipped: {left[0]}" in str(tnlm.report(model))
    ids = {"input_ids": IDS[None, :16]}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = ids["input_ids"]
    tnlm.save(model, tmp_path / "out")
    loaded = tnlm.load(tmp_path / "out")
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)


@pytest.mark.parametrize("scheme", ["svd", "kron", "tucker"])
def test_a_weight_that_is_read_is_right_without_data(make, scheme):
    model = tnlm.compress(make("mamba"), scheme, keep_targets=0.7, progress=False)
    logits = model(IDS[None, :16]).logits
    torch.testing.assert_close(tnlm.to_dense(model)(IDS[None, :16]).logits, logits)


def test_a_plan_says_why_its_matrix_is_out_of_reach(make):
    decided = tnlm.plan(make("mamba"), "svd", keep_targets=0.7)
    with pytest.raises(TargetError, match="the data never reaches it"):
        tnlm.compress(make("mamba"), replace(decided, metric="input"), **DATA, progress=False)


def test_nothing_in_reach_is_an_error(make):
    with pytest.raises(CalibrationError, match="reached none of the modules"):
        tnlm.compress(make("mamba"), "svd-llm", targets=["dt_proj"], **DATA, progress=False)


def test_a_cache_knows_what_was_not_reached(make, tmp_path):
    for _ in range(2):
        model = make("mamba")
        tnlm.compress(model, "svd-llm", **DATA, cache_dir=tmp_path, progress=False)
        assert len(tnlm.report(model).plan.skipped) == 2


def test_weights_that_are_read_may_be_trained(make):
    model = make("mamba")
    options = {"recover": "mixed-rank", "recover_tokens": 32}
    tnlm.compress(model, "svd-llm", **options, **DATA, progress=False)
    assert model(IDS[None, :16]).logits.isfinite().all()


def test_a_lora_that_peft_refuses_is_named(make):
    with pytest.raises(TargetError, match=r"PEFT cannot attach a LoRA.*out_proj"):
        tnlm.compress(make("mamba"), "lora-svd", **DATA, progress=False)
