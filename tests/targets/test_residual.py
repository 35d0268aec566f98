from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tnlm
from tests.rotations import IDS, SIZES, turn_of
from tnlm.errors import ModelError, OptionError
from tnlm.targets.residual import residual_stream

MIXTURES = [
    (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    ),
    (
        GraniteMoeSharedForCausalLM,
        GraniteMoeSharedConfig,
        {"num_local_experts": 4, "shared_intermediate_size": 24},
    ),
]


def refused(model, match):
    """The model is refused, and stays as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=match):
        tnlm.rotate(model, turn_of())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@torch.no_grad()
def keeps_logits(model):
    before = model.eval()(IDS).logits
    after = tnlm.rotate(model, turn_of())(IDS).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)


def test_modules_that_tokens_do_not_run_are_refused_by_name():
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=63)
    model = LlavaForConditionalGeneration(config).eval()
    refused(model, r"model\.vision_tower, model\.multi_modal_projector were not run")


def test_parameters_that_are_read_without_a_call_are_known():
    torch.manual_seed(0)  # a Mamba reads the weight of its convolution itself
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    keeps_logits(MambaForCausalLM(MambaConfig(**sizes, eos_token_id=0, tie_word_embeddings=False)))


@pytest.mark.parametrize(("kind", "config", "sizes"), MIXTURES)
def test_experts_are_refused_in_half_precision_as_well(kind, config, sizes):
    torch.manual_seed(0)
    refused(kind(config(**SIZES, **sizes)).bfloat16().eval(), "changes its logits")


def test_a_large_gain_does_not_hide_the_offset_of_a_norm():
    model = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8))
    model.model.layers[0].input_layernorm.weight.data[3] = 3000.0
    for kept in (model, copy.deepcopy(model).bfloat16()):
        assert {norm.offset for norm in residual_stream(kept).norms.values()} == {1.0}


def test_norms_of_queries_as_wide_as_the_stream_are_none_of_its_norms():
    keeps_logits(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)))


def test_weights_without_data_or_quantized_are_refused(tiny_llama):
    with torch.device("meta"):
        empty = type(tiny_llama())(tiny_llama().config)
    for rotate in (
        lambda model: tnlm.rotate(model, turn_of()),
        lambda model: tnlm.procrustes_rotation(model, "kron", terms=2, progress=False),
    ):
        with pytest.raises(ModelError, match="has no data"):
            rotate(empty)
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="load the model unquantized"):
        tnlm.rotate(model, turn_of())


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [
        (torch.eye(32, device="meta"), "is on the meta device"),
        (torch.eye(32).to_sparse(), "is sparse"),
        (torch.tensor(1.0), "is a scalar"),
    ],
)
def test_rotations_that_are_no_dense_matrix_are_refused(rotation, reason, tiny_llama):
    with pytest.raises(OptionError, match=reason):
        tnlm.rotate(tiny_llama(), rotation)


def test_untie_is_true_or_false(tiny_llama):
    with pytest.raises(OptionError, match="untie='no'; allowed: True or False"):
        tnlm.rotate(tiny_llama(), turn_of(), untie="no")


def test_weights_shared_between_layers_are_refused_by_name(tiny_llama):
    for part in ("mlp.down_proj", "input_layernorm"):
        model = tiny_llama()
        one, other = (layer.get_submodule(part) for layer in model.model.layers)
        other.weight = one.weight
        refused(model, rf"model.layers.0.{part} and model.layers.1.{part} share a weight")


def test_a_norm_that_is_called_twice_is_folded_into_all_its_readers(tiny_llama):
    model = tiny_llama()
    one, other = model.model.layers
    other.input_layernorm = one.input_layernorm
    one.input_layernorm.weight.data.uniform_(0.5, 1.5)
    keeps_logits(model)


def test_a_layer_that_reads_two_norms_is_refused(tiny_llama):
    model = tiny_llama()
    one, other = model.model.layers
    other.mlp = one.mlp
    refused(model, r"gate_proj reads .*0\.post_attention_layernorm and .*1\.post_attention")


def test_a_head_of_zeros_cannot_be_checked(tiny_llama):
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    refused(model, "logits that are all zero")
