from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    LlamaForCausalLM,
)
from transformers.trainer_utils import validate_quantization_for_training

import tnlm
from tests.conftest import cover, sort_of
from tnlm.checkpoint.description import TnlmConfig
from tnlm.schemes import schemes

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
KINDS = ["llama", "tied-llama", "gpt2", "masked-bert"]
PAIRS = cover(*KINDS)

every_kind = pytest.mark.parametrize("kind", KINDS)


def auto_class(kind):
    return AutoModelForMaskedLM if kind == "masked-bert" else AutoModelForCausalLM


def outputs(model):
    """Logits of a model with a head, hidden states of a body."""
    with torch.no_grad():
        return model(IDS)[0]


def read(cls, directory, **arguments):
    """Load a model, and the tensors that it lacks or has too many."""
    model, info = cls.from_pretrained(directory, output_loading_info=True, **arguments)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model, info["missing_keys"]


@pytest.mark.parametrize(("kind", "scheme"), PAIRS)
def test_save_and_load_as_any_other_model(kind, scheme, compressed, tmp_path):
    model = compressed(kind, scheme)
    model.save_pretrained(tmp_path)
    loaded, missing = read(auto_class(kind), tmp_path)
    assert not missing
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    "arguments", [{"device_map": "cpu"}, {"dtype": "auto"}, {"low_cpu_mem_usage": True}]
)
def test_arguments_of_from_pretrained_work(arguments, compressed, tmp_path):
    model = compressed("tied-llama", "albert")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    loaded, missing = read(AutoModelForCausalLM, tmp_path, **arguments)
    assert not missing
    assert torch.equal(outputs(loaded), outputs(model))


@every_kind
@pytest.mark.parametrize("scheme", ["svd", "albert", "tensorgpt"])
def test_a_body_is_read_from_the_checkpoint_of_a_head(kind, scheme, compressed, tmp_path):
    model = compressed(kind, scheme)
    model.save_pretrained(tmp_path)
    body, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert all("pooler" in name for name in info["missing_keys"])
    assert torch.equal(outputs(body), outputs(model.base_model))


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["svd", "albert", "tensorgpt"])
def test_a_classifier_is_read_from_the_checkpoint_of_a_language_model(
    kind, scheme, compressed, tmp_path
):
    model = compressed(kind, scheme)
    model.save_pretrained(tmp_path / "language")
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "language", num_labels=3, pad_token_id=0, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert torch.equal(outputs(classifier.base_model), outputs(model.base_model))
    classifier.save_pretrained(tmp_path / "classifier")
    again, missing = read(AutoModelForSequenceClassification, tmp_path / "classifier")
    assert not missing
    assert torch.equal(outputs(again), outputs(classifier))


@pytest.mark.parametrize("kind", ["tied-llama", "gpt2", "masked-bert"])
@pytest.mark.parametrize("scheme", ["svd", "albert"])
def test_a_body_saved_alone_is_read_under_its_tied_head(kind, scheme, compressed, tmp_path):
    model = compressed(kind, scheme)
    model.save_pretrained(tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    body.save_pretrained(tmp_path / "body")
    loaded, info = auto_class(kind).from_pretrained(tmp_path / "body", output_loading_info=True)
    # BERT's body has a pooler that its head does not use, and its head has layers of its own.
    known = "pooler.", "cls.predictions."
    assert all(name.startswith(known) for name in info["missing_keys"] | info["unexpected_keys"])
    assert torch.equal(outputs(loaded.base_model), outputs(model.base_model))
    if kind != "masked-bert":
        assert torch.equal(outputs(loaded), outputs(model))
    tables = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert {id(p) for p in tables[0].parameters()} <= {id(p) for p in tables[1].parameters()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "masked-bert"])
def test_a_body_may_be_compressed_and_read_under_a_head(kind, make_model, tmp_path):
    body = tnlm.compress(make_model(kind).base_model, "svd")
    body.save_pretrained(tmp_path)
    loaded = auto_class(kind).from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded.base_model), outputs(body))


def test_an_untied_head_may_be_compressed_and_left_behind(make_model, tmp_path):
    model = tnlm.compress(make_model("llama"), "svd", targets=["lm_head", "up_proj"])
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))
    body = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(body), outputs(model.model))


@every_kind
def test_saving_a_loaded_model_again_writes_the_same(kind, compressed, tmp_path):
    compressed(kind, "svd").save_pretrained(tmp_path / "first")
    auto_class(kind).from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        texts = [(tmp_path / folder / name).read_bytes() for folder in ("first", "second")]
        assert texts[0] == texts[1], name


@pytest.mark.parametrize("export", [tnlm.to_dense, lambda model: model.dequantize()])
@every_kind
@pytest.mark.parametrize("loaded", [False, True])
def test_a_dense_export_is_a_plain_checkpoint(
    loaded, kind, export, compressed, make_model, tmp_path
):
    model = compressed(kind, "svd")
    if loaded:
        model.save_pretrained(tmp_path / "compressed")
        model = auto_class(kind).from_pretrained(tmp_path / "compressed")
    dense = export(model)
    expected = outputs(dense)
    dense.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    again, missing = read(auto_class(kind), tmp_path / "dense")
    assert not missing
    assert torch.equal(outputs(again), expected)
    assert [type(m) for m in again.modules()] == [type(m) for m in make_model(kind).modules()]
    assert again.state_dict().keys() == make_model(kind).state_dict().keys()


@pytest.mark.parametrize(("kind", "scheme"), [pair for pair in PAIRS if pair[0] != "llama"])
def test_a_dense_export_is_tied_again(kind, scheme, compressed, make_model, tmp_path):
    if kind == "tied-llama" and sort_of(schemes()[scheme]) == "biases":
        return  # there is no dense form
    dense = compressed(kind, scheme).dequantize()
    assert dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert dense.all_tied_weights_keys == make_model(kind).all_tied_weights_keys
    dense.save_pretrained(tmp_path)
    again, missing = read(auto_class(kind), tmp_path)
    assert not missing
    assert torch.equal(outputs(again), outputs(dense))


def test_a_loaded_model_trains_and_changes_dtype(compressed, tmp_path):
    compressed("tied-llama", "svd").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    validate_quantization_for_training(model)  # what Trainer asks first
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32


def test_a_loaded_model_computes_as_it_did_before_it_was_saved(tmp_path):
    """Some models read a weight in place of calling its layer, unless they count as quantized."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "state_size": 8}
    model = FalconMambaForCausalLM(FalconMambaConfig(vocab_size=64, time_step_rank=16, **sizes))
    tnlm.compress(model.eval(), "svd", keep_targets=0.6).save_pretrained(tmp_path)
    loaded, _ = read(FalconMambaForCausalLM, tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert not hasattr(loaded.config, "_is_quantized")


def test_loading_does_not_compress(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre_quantized"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=TnlmConfig(scheme="svd"))


def test_unknown_fields_of_a_later_version_are_passed_over():
    assert TnlmConfig(scheme="svd", colour="red").to_dict() == TnlmConfig(scheme="svd").to_dict()


def test_rules_for_parallel_modules_are_dropped_where_they_were_replaced(compressed):
    quantizer = compressed("llama", "svd", targets=r".*q_proj").hf_quantizer
    plan = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.mlp.up_proj": "colwise"}
    quantizer.update_parallel_plan(None, plan)
    assert plan == {"model.layers.*.mlp.up_proj": "colwise"}
