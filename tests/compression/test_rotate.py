from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tnlm
from tests import rotations
from tests.rotations import IDS, turn_of
from tnlm.errors import ModelError, OptionError
from tnlm.targets.residual import residual_stream

SIZES = {**rotations.SIZES, "head_dim": 8}
FAMILIES = [
    (GemmaForCausalLM, GemmaConfig),
    (Qwen2ForCausalLM, Qwen2Config),
    (Qwen3ForCausalLM, Qwen3Config),
]


def with_gains(model):
    """Draw gains and biases, which are 1 and 0 in a new model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.3 * noise.to(parameter)
    return model.eval()


@pytest.fixture
def exact(tiny_llama):
    """A Llama in float64, whose norms work in float64 as well."""

    def make(**config):
        model = tiny_llama(attention_bias=True, mlp_bias=True, **config)
        for name in [name for name, _ in model.named_modules()]:
            if name.endswith("norm"):
                model.set_submodule(name, nn.RMSNorm(32, eps=1e-6))
        return with_gains(model.double())

    return make


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def contents(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_a_rotation_keeps_the_logits_up_to_rounding(exact):
    model = exact()
    before, weights = logits(model), contents(model)
    assert tnlm.rotate(model, turn_of()) is model
    assert not unchanged(model, weights)
    assert float((logits(model) - before).abs().max()) <= 1e-13 * float(before.abs().max())
    norms = [m for m in model.modules() if isinstance(m, nn.RMSNorm)]
    assert all(bool((norm.weight == 1).all()) for norm in norms)


def test_the_stream_is_rotated(exact):
    model, turn = exact(), turn_of()
    before = model(IDS, output_hidden_states=True).hidden_states
    after = tnlm.rotate(model, turn)(IDS, output_hidden_states=True).hidden_states
    for old, new in zip(before[:-1], after[:-1], strict=True):  # the last is normalized
        torch.testing.assert_close(new, old @ turn)


@pytest.mark.parametrize(("kind", "config"), FAMILIES)
def test_families_keep_their_logits(kind, config):
    torch.manual_seed(0)
    model = with_gains(kind(config(**SIZES)))
    before = logits(model)
    torch.testing.assert_close(logits(tnlm.rotate(model, turn_of())), before, atol=1e-5, rtol=1e-4)


def test_half_precision_keeps_dtype_flags_and_logits(tiny_llama):
    model = tiny_llama().bfloat16()
    model.lm_head.weight.requires_grad_(False)
    before = logits(model)
    tnlm.rotate(model.train(), turn_of())
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    change = (logits(model.eval()) - before).abs().max() / before.abs().max()
    assert float(change) <= 0.05


def test_a_tied_head_is_refused_with_the_remedy(tiny_llama):
    model = with_gains(tiny_llama(tie_word_embeddings=True))
    before = contents(model)
    with pytest.raises(ModelError, match="untie=True gives it a weight of its own, which adds 2,0"):
        tnlm.rotate(model, turn_of())
    assert unchanged(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_model_is_saved_and_loaded_as_an_ordinary_one(tiny_llama, tmp_path):
    model = with_gains(tiny_llama(tie_word_embeddings=True))
    before = logits(model)
    tnlm.rotate(model, turn_of(), untie=True)
    model.save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(loaded), before, atol=1e-5, rtol=1e-4)


def test_a_rotated_model_is_compressed_and_loaded(tiny_llama, tmp_path):
    model = tnlm.rotate(tiny_llama(tie_word_embeddings=True), turn_of(), untie=True)
    tnlm.compress(model, "kron", keep_targets=0.8, progress=False)
    tnlm.save(model, tmp_path / "m")
    torch.testing.assert_close(logits(tnlm.load(tmp_path / "m")), logits(model))


def test_a_layer_norm_is_refused_with_the_reason(make_model):
    model = make_model("gpt2")
    before = contents(model)
    with pytest.raises(ModelError, match=r"ln_1 is a LayerNorm; only an RMSNorm"):
        tnlm.rotate(model, turn_of())
    assert unchanged(model, before)
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**{k: SIZES[k] for k in SIZES if "key" not in k}))
    with pytest.raises(ModelError, match="subtracts a mean"):
        tnlm.rotate(bert, turn_of())


def test_a_norm_after_a_sub_layer_is_refused_with_the_reason():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES))
    with pytest.raises(ModelError, match=r"no linear layer reads what .*post_attention_layernorm"):
        tnlm.rotate(model, turn_of())


def test_readers_that_are_no_linear_layers_are_refused():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
    before = contents(model)
    with pytest.raises(ModelError, match=r"no linear layer reads|something else reads"):
        tnlm.rotate(model.eval(), turn_of())
    assert unchanged(model, before)


def test_a_model_without_a_head_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="computes no logits; give a model with its head"):
        tnlm.rotate(LlamaModel(tiny_llama().config), turn_of())


def test_a_model_with_broken_weights_is_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        tnlm.rotate(model, turn_of())


def test_a_compressed_model_is_refused(tiny_llama):
    model = tnlm.compress(tiny_llama(), "svd", rank=4, progress=False)
    with pytest.raises(ModelError, match="compressed already"):
        tnlm.rotate(model, turn_of())


@pytest.mark.parametrize(
    ("rotation", "reason"),
    [
        (torch.ones(32, 32), "is not orthogonal"),
        (torch.full((32, 32), float("nan")), "is not orthogonal"),
        (torch.eye(16), "is 16 x 16; allowed: an orthogonal matrix of 32 x 32"),
        (torch.eye(32, dtype=torch.long), "rotation=Tensor"),
        (None, "rotation=NoneType"),
    ],
)
def test_what_is_no_rotation_is_refused(rotation, reason, tiny_llama):
    model = tiny_llama()
    before = contents(model)
    with pytest.raises(OptionError, match=reason):
        tnlm.rotate(model, rotation)
    assert unchanged(model, before)


def test_a_failure_in_the_middle_leaves_the_model(tiny_llama, monkeypatch):
    model = with_gains(tiny_llama(tie_word_embeddings=True))
    before, config = contents(model), model.config.to_dict()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tnlm.compression.rotate._check_same", fail)
    with pytest.raises(KeyboardInterrupt):
        tnlm.rotate(model, turn_of(), untie=True)
    assert unchanged(model, before)
    assert model.config.to_dict() == config
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_readers_and_writers_are_found(tiny_llama):
    stream = residual_stream(tiny_llama())
    assert (stream.table, stream.width) == ("model.embed_tokens", 32)
    block = "model.layers.1"
    norms = {name: norm.readers for name, norm in stream.norms.items()}
    attention = tuple(f"{block}.self_attn.{part}_proj" for part in "qkv")
    assert norms[f"{block}.input_layernorm"] == attention
    assert norms["model.norm"] == ("lm_head",)
    assert stream.writers[-2:] == (f"{block}.self_attn.o_proj", f"{block}.mlp.down_proj")
