"""Weights in few bits: saved, loaded, made dense, in the bytes planned; and what is refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tnlm
from tnlm.errors import BudgetError, CheckpointError, ModelError, OptionError
from tnlm.layers.packed import Packed, PackedEmbedding, PackedHead, PackedLinear
from tnlm.schemes import get_scheme as scheme

IDS = torch.arange(2 * 24).remainder(61).reshape(2, -1) + 3
DATA = {"calibration": torch.arange(512) % 61 + 3, "max_length": 32, "progress": False}
WIDE = {"hidden_size": 64, "intermediate_size": 96}

RECIPES = {
    "rtn": {"scheme": "rtn"},
    "rtn int3": {"scheme": "rtn", "precision": "int3", "symmetric": False},
    "rtn tables": {"scheme": "rtn", "precision": "int4", "targets": ["all-linear", "embeddings"]},
    "gptq": {"scheme": "gptq", **DATA},
    "gptq tables": {"scheme": "gptq", "targets": ["all-linear", "embeddings"], **DATA},
    "low rank": {"scheme": "svd", "precision": "int8"},
    "kron": {"scheme": "kron", "precision": "int4", "group": 16},
    "narrowed": {"scheme": "auto", "precision": "int4", "keep_targets": 0.6, **DATA},
    "bytes": {"scheme": "auto-bytes", "keep_targets": 0.2, **DATA},
    "cascade": {"scheme": "svd-llm", "precision": "int8", "cascade": "sequential", **DATA},
}


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    """Compress a tied Llama in bfloat16 by each recipe, once."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(tie_word_embeddings=True, **WIDE).save_pretrained(folder)
    found = {}

    def make(name):
        if name not in found:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
            found[name] = tnlm.compress(model, **{"progress": False, **RECIPES[name]})
        return found[name]

    return make


@pytest.mark.parametrize("name", RECIPES)
def test_saved_and_loaded_the_logits_are_the_same_and_the_bytes_as_planned(made, name, tmp_path):
    model = made(name)
    with torch.no_grad():
        wanted = model(IDS).logits
        tnlm.save(model, tmp_path / "saved")
        for load in (tnlm.load, AutoModelForCausalLM.from_pretrained):
            again = load(tmp_path / "saved").eval()
            assert torch.equal(again(IDS).logits, wanted)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    assert size == tnlm.report(model).plan.model_after.bytes


@pytest.mark.parametrize("name", RECIPES)
def test_made_dense_it_computes_the_same(made, name):
    model = copy.deepcopy(made(name))
    with torch.no_grad():
        wanted = model.float()(IDS).logits
        dense = tnlm.to_dense(model)
        assert not any(isinstance(module, Packed | PackedHead) for module in dense.modules())
        assert torch.allclose(dense(IDS).logits, wanted, rtol=1e-3, atol=1e-3)


def test_shards_hold_the_codes(made, tmp_path):
    model = made("gptq tables")
    tnlm.save(model, tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(tnlm.load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def test_tables_share_their_codes_with_the_head(made):
    model = made("rtn tables")
    table, head = model.get_input_embeddings(), model.lm_head
    assert isinstance(table, PackedEmbedding)
    assert isinstance(head, PackedHead)
    assert not head.state_dict()


def test_generation_decodes_the_same_tokens_as_dense_weights(made):
    model = made("rtn")
    dense = tnlm.to_dense(copy.deepcopy(model))
    found = [m.generate(IDS[:1, :8], max_new_tokens=8, do_sample=False) for m in (model, dense)]
    assert torch.equal(*found)


def test_fused_projections_are_packed_part_by_part(tiny_gpt2):
    model = tnlm.compress(tiny_gpt2(n_embd=64), "rtn", progress=False)
    parts = model.transformer.h[0].attn.c_attn
    assert all(isinstance(getattr(parts, name), PackedLinear) for name in parts.parts)
    dense = tnlm.to_dense(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.allclose(dense(IDS).logits, model(IDS).logits, atol=1e-4)


def test_narrowed_layers_and_their_bits_are_in_the_report(made):
    layers = tnlm.report(made("narrowed")).plan.layers
    assert {layer.precision["bits"] for layer in layers} == {4}
    assert "channel-ranks" in {layer.format for layer in layers}
    assert "int4" in str(tnlm.report(made("narrowed")))


def test_a_plan_carries_the_bits(tiny_llama):
    base = tiny_llama(**WIDE)
    plan = tnlm.plan(base, "rtn", precision="int4", progress=False)
    edited = json.loads(plan.to_json())
    edited["layers"][0]["precision"] = {"bits": 8, "group": None, "symmetric": True}
    again = tnlm.Plan.from_json(json.dumps(edited))
    model = tnlm.compress(base, again, progress=False)
    kinds = [m.precision.bits for m in model.modules() if isinstance(m, PackedLinear)]
    assert kinds[0] == 8
    assert set(kinds[1:]) == {4}


@pytest.mark.parametrize("precision", [{"bits": 9}, {"bits": 4, "other": 1}, {}, 4])
def test_a_plan_with_a_broken_precision_is_refused(tiny_llama, precision):
    plan = json.loads(tnlm.plan(tiny_llama(), "rtn", progress=False).to_json())
    plan["layers"][0]["precision"] = precision
    with pytest.raises(OptionError):
        tnlm.Plan.from_json(json.dumps(plan))


def test_feedback_beats_the_nearest_codes_on_the_inputs_it_was_fitted_to(tiny_llama):
    base = tiny_llama(**WIDE)
    ids = DATA["calibration"][:256].reshape(8, 32)

    def apart(scheme, **data):
        model = tnlm.compress(copy.deepcopy(base), scheme, precision="int3", **data)
        with torch.no_grad():
            return float((model(ids).logits - base(ids).logits).norm())

    assert apart("gptq", **DATA) < apart("rtn", progress=False)


def test_training_changes_the_scales_and_leaves_the_codes(tiny_llama):
    model = tnlm.compress(tiny_llama(**WIDE), "rtn", precision="int4", progress=False).train()
    layer = model.model.layers[0].mlp.up_proj
    codes, scales = layer.codes.clone(), layer.scales.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(layer.codes, codes)
    assert not torch.equal(layer.scales, scales)


def broken(tmp_path, made, change):
    tnlm.save(made("gptq"), tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "saved"


CODES, SCALES = (f"model.layers.0.mlp.up_proj.{name}" for name in ("codes", "scales"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t[SCALES].fill_(torch.nan), "not finite"),
        (lambda t: t.pop(CODES), "missing keys"),
        (lambda t: t.update({CODES: t[CODES].float()}), "allowed for codes: U8"),
        (lambda t: t.update({CODES: t[CODES][:, :-1].contiguous()}), "mismatched|size"),
    ],
    ids=["nan", "missing", "dtype", "shape"],
)
def test_broken_files_are_refused(tmp_path, made, change, said):
    with pytest.raises(CheckpointError, match=said):
        tnlm.load(broken(tmp_path, made, change))


@pytest.mark.parametrize(
    "precision", [{"up": {"bits": 4}}, {"": {"bits": 12}}, {"": {"bits": 4, "other": 1}}, {"": 4}]
)
def test_broken_entries_are_refused(tmp_path, made, precision):
    tnlm.save(made("gptq"), tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["modules"]["model.layers.0.mlp.up_proj"]["precision"] = precision
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="up_proj"):
        tnlm.load(tmp_path / "saved")


REFUSED = {
    "unknown": ({"scheme": "rtn", "precision": "int1"}, "int2 to int8"),
    "group": ({"scheme": "rtn", "group": 3}, "8 columns or more"),
    "group alone": ({"scheme": "svd", "group": 32}, "no effect without precision="),
    "symmetric alone": ({"scheme": "svd", "symmetric": False}, "no effect without precision="),
    "none": ({"scheme": replace(scheme("rtn"), precision=None)}, "no format and no precision"),
    "keep": ({"scheme": "rtn", "keep_targets": 0.5}, "no effect with scheme 'rtn'"),
    "auto": ({"scheme": "svd", "precision": "auto"}, "unit='bytes' and allocation='loss'"),
    "refine": ({"scheme": "svd-llm", "precision": "int4", "refine": 8, **DATA}, "refine="),
    "portable": (
        {"scheme": "auto", "precision": "int4", "portable": "llama.cpp", **DATA},
        "types of its own",
    ),
    "unit": (
        {"scheme": "svd", "precision": "int4", "unit": "bytes", "allocation": "energy"},
        "allocation='loss'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_before_work(tiny_llama, name):
    model, (call, said) = tiny_llama(), REFUSED[name]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((OptionError, BudgetError), match=said):
        tnlm.compress(model, **call)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_packed_model_is_not_compressed_again(made):
    with pytest.raises(ModelError, match="compressed"):
        tnlm.compress(copy.deepcopy(made("rtn")), "svd", progress=False)


def test_too_few_bytes_say_the_least(tiny_llama):
    with pytest.raises(BudgetError, match="the smallest fraction"):
        tnlm.compress(tiny_llama(**WIDE), "auto-bytes", keep_targets=0.001, **DATA)


# What others do with a packed model


def test_layer_loras_are_not_merged_into_codes(made, tiny_llama):
    model = copy.deepcopy(made("low rank")).float()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    for merge in ("concatenate", "retruncate"):
        with pytest.raises(ModelError, match="merge='adapter'"):
            tnlm.heal(model, [batch], rank=2, tokens=64, on="layers", merge=merge, progress=False)


def test_small_weights_keep_their_bits_in_float16(tiny_llama):
    model = tiny_llama(**WIDE).half()
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(0.02)
    weight = layer.weight.detach().double()
    tnlm.compress(model, "rtn", progress=False)
    stored = model.model.layers[0].mlp.up_proj.weight.detach().double()
    assert float((stored - weight).norm() / weight.norm()) < 0.01


@pytest.mark.parametrize(
    "call",
    [
        {"scheme": "albert", "precision": "int4"},
        {"scheme": "svd", "targets": "embeddings", "precision": "int4"},
        {"scheme": "svd", "tolerance": 0.3, "precision": "int2"},
        {"scheme": "rtn", "max_macs": 0.5},
        {"scheme": "rtn", "unit": "macs"},
        {"scheme": "rtn", "portable": "transformers"},
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(tiny_llama, call):
    with pytest.raises((OptionError, BudgetError), match=r"no effect|on top of|types of its own"):
        tnlm.compress(tiny_llama(tie_word_embeddings=True), progress=False, **call)


def test_codes_count_as_parameters(made):
    model, report = made("rtn tables"), tnlm.report(made("rtn tables"))
    tokens = {"prompt_tokens": (4,), "new_tokens": 2, "repeats": 1}
    assert tnlm.efficiency(model, **tokens).model.parameters == report.parameters_after


def test_speed_in_few_bits_is_measured_and_not_predicted(made):
    with pytest.raises(ModelError, match=r"tnlm\.efficiency"):
        tnlm.predict_speed(made("low rank"))


def test_a_packed_vocabulary_is_not_resized(made):
    model = copy.deepcopy(made("rtn tables"))
    with pytest.raises(ModelError, match="few bits"):
        model.resize_token_embeddings(70)
    with pytest.raises(ModelError, match="few bits"):
        tnlm.set_rows(model, torch.tensor([3]), torch.ones(1, 64))


def test_packed_tables_are_not_healed(made):
    model = copy.deepcopy(made("rtn tables")).float()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    tnlm.heal(model, [batch], rank=2, tokens=64, merge="adapter", progress=False)


def test_narrowed_packed_layers_are_refused_by_plain_checkpoints_or_written(made, tmp_path):
    before = {name: type(module) for name, module in made("narrowed").named_modules()}
    with pytest.raises(ModelError):  # of several widths
        tnlm.export(made("narrowed"), tmp_path / "plain", to="transformers")
    assert {name: type(module) for name, module in made("narrowed").named_modules()} == before


def test_a_trained_layer_takes_inputs_without_gradients(made):
    layer = copy.deepcopy(made("rtn").model.layers[0].mlp.up_proj)
    layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
    assert layer.scales.grad is not None


def test_a_tied_head_finds_its_offloaded_table(made, tmp_path):
    tnlm.save(made("rtn tables"), tmp_path / "saved")
    where = {"model": "disk", "lm_head": "disk"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=where, offload_folder=tmp_path / "off"
    )
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, made("rtn tables")(IDS).logits)


@pytest.mark.parametrize("scheme", ["rtn", "svd"])
def test_from_files_to_files_codes_are_the_same(scheme, tiny_llama, tmp_path):
    tiny_llama(**WIDE).save_pretrained(tmp_path / "dense")
    tnlm.compress_files(tmp_path / "dense", tmp_path / "out", scheme, precision="int4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    tnlm.compress(model, scheme, precision="int4", progress=False)
    with torch.no_grad():
        assert torch.equal(tnlm.load(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_the_matrices_of_a_plan_may_be_stored_in_few_bits(tiny_llama):
    plan = tnlm.plan(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    whole = tnlm.compress(tiny_llama(), plan, progress=False)
    model = tnlm.compress(tiny_llama(), plan, precision="int4", group=16, progress=False)
    again = tnlm.compress(
        tiny_llama(), "svd", keep_targets=0.6, precision="int4", group=16, progress=False
    )
    report, other = tnlm.report(model), tnlm.report(again)
    assert [layer.precision for layer in report.plan.layers] == [
        layer.precision for layer in other.plan.layers
    ]
    assert report.plan.model_after == other.plan.model_after
    assert report.plan.request == other.plan.request
    assert report.plan.model_after.bytes < tnlm.report(whole).plan.model_after.bytes
    ids = torch.arange(3, 11)[None]
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"precision": "auto"}, "precision='auto' with unit='params'"),
        ({"precision": "int9"}, "int9"),
        ({"group": 16}, "group=16 has no effect without precision="),
        ({"rank": 4}, "or with data, precision and group"),
    ],
)
def test_bits_of_a_plan_that_are_refused(given, words, tiny_llama):
    plan = tnlm.plan(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    with pytest.raises(OptionError, match=words):
        tnlm.compress(tiny_llama(), plan, progress=False, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"precision": "int4"},
            r"has no effect: every matrix .* model\.layers\.0\.self_attn\.q_proj",
        ),
        ({"group": 16}, "group=16 has no effect without precision="),
    ],
)
def test_bits_for_a_plan_that_has_them_are_refused(given, words, tiny_llama):
    plan = tnlm.plan(tiny_llama(), "svd", precision="int8", keep_targets=0.6, progress=False)
    with pytest.raises(OptionError, match=words):
        tnlm.compress(tiny_llama(), plan, progress=False, **given)


def test_bits_for_a_plan_that_has_some_are_for_the_others(tiny_llama, caplog):
    plan = tnlm.plan(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    own = {"bits": 8, "group": None, "symmetric": True}
    plan = replace(plan, layers=(replace(plan.layers[0], precision=own), *plan.layers[1:]))
    model = tnlm.compress(tiny_llama(), plan, precision="int4", progress=False)
    assert "1 of 14 matrices have bits in the plan and keep them" in caplog.text
    bits = [layer.precision["bits"] for layer in tnlm.report(model).plan.layers]
    assert bits == [8] + [4] * 13


def test_bits_are_not_given_with_plans_in_time_or_for_a_runtime(tiny_llama):
    asked = {"keep_targets": 0.9, **DATA}
    plan = tnlm.plan(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    plan = replace(plan, request={**plan.request, "unit": "time"})
    with pytest.raises(OptionError, match="with a plan for unit='time'"):
        tnlm.compress(tiny_llama(), plan, precision="int8", progress=False)
    plan = tnlm.plan(tiny_llama(), "auto", portable="vllm", **asked)
    with pytest.raises(OptionError, match=r"portable='vllm', whose runtime has types of its own"):
        tnlm.compress(tiny_llama(), plan, precision="int4", **DATA)
