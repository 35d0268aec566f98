from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers import GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

import tnlm
from tnlm.errors import CheckpointError, OptionError
from tnlm.layers.adapters import matrix
from tnlm.layers.linear import FactorizedLinear
from tnlm.runtimes.weights import plain_weights
from tnlm.targets.channel_ranks import RankedFeedForward, layers
from tnlm.targets.channels import FeedForward, pairs
from tnlm.targets.selection import select

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
MLP = r".*\.mlp\..*"
SCHEME = dataclasses.replace(tnlm.scheme("auto"), formats=("channel-ranks",))
ASKED = {"targets": MLP, "keep_targets": 0.4, **DATA}
KINDS = ["llama", "gpt2", "phi3"]
UP = {
    "llama": "model.layers.1.mlp.up_proj",
    "gpt2": "transformer.h.1.mlp.c_fc",
    "phi3": "model.layers.1.mlp.gate_up_proj",
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(make_model, kind):
    if kind != "phi3":
        return make_model(kind)
    torch.manual_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def cut(make_model):
    """Compress the feed-forward layers of a model in channels and ranks; copies of one fit."""
    fitted = {kind: tnlm.compress(made(make_model, kind), SCHEME, **ASKED) for kind in KINDS}
    return lambda kind: copy.deepcopy(fitted[kind])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def count(model):
    return sum(p.numel() for p in model.parameters())


@every_kind
def test_layers_are_found_whole(kind, make_model):
    model = made(make_model, kind)
    targets = select(model).targets
    for layer, pair in zip(layers(model, targets), pairs(model, targets), strict=True):
        hidden, out = pair.shape
        inputs = [producer.shape[1] for producer in pair.producers]
        assert layer.sizes == (out, *inputs)
        assert layer.shape == (out + sum(inputs), hidden)
        assert layer.params == pair.params == layer.shape[0] * hidden
        assert layer.dense_cost(4).params == layer.params
        tall = layer.weight(model).split(list(layer.sizes))
        assert torch.equal(tall[0], pair.consumer.weight(model))
        assert torch.equal(tall[1], pair.producers[0].weight(model).T)


@every_kind
def test_costs_and_errors_are_those_planned(kind, cut, make_model):
    model, report = cut(kind), tnlm.report(cut(kind))
    planned = tnlm.plan(made(make_model, kind), SCHEME, **ASKED)
    assert report.parameters_after == count(model) < count(made(make_model, kind))
    for ours, theirs in zip(report.plan.layers, planned.layers, strict=True):
        assert (ours.format, ours.spec, ours.after) == (theirs.format, theirs.spec, theirs.after)
        assert ours.error == pytest.approx(theirs.error, rel=1e-4)
    assert any(layer.format == "channel-ranks" for layer in planned.layers)
    assert any(isinstance(module, FactorizedLinear) for module in model.modules())


@every_kind
def test_it_is_the_dense_model_with_its_matrices(kind, cut, make_model):
    model, plain = cut(kind), made(make_model, kind)
    expected = logits(model)
    dense = tnlm.to_dense(model)
    assert [type(m) for m in dense.modules()] == [type(m) for m in plain.modules()]
    assert {n: t.shape for n, t in dense.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_a_saved_model_is_the_same(kind, cut, tmp_path):
    model = cut(kind)
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(model))
    assert count(loaded) == count(model)


@every_kind
def test_plain_weights_are_narrow(kind, cut):
    model = cut(kind)
    found = plain_weights(model)
    turned = isinstance(model, GPT2LMHeadModel)
    shape = found[f"{UP[kind]}.weight"].shape
    [layer] = [each for each in tnlm.report(model).plan.layers if UP[kind] in each.name]
    parts = 2 if kind == "phi3" else 1
    assert shape[1 if turned else 0] == parts * layer.spec["width"] < parts * 48
    padded = tnlm.to_dense(model).get_submodule(UP[kind]).weight.detach()
    padded = padded.T if turned else padded
    kept = found[f"{UP[kind]}.weight"].T if turned else found[f"{UP[kind]}.weight"]
    first = layer.spec["width"]
    assert torch.equal(padded[:first], kept[:first])
    assert not padded[first:48].any()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_few_bits_on_top(precision, make_model, tmp_path):
    asked = dataclasses.replace(SCHEME, precision=precision)
    model = tnlm.compress(make_model("llama"), asked, **ASKED | {"keep_targets": 0.5}, unit="bytes")
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model"))
    assert torch.equal(logits(loaded), logits(model))
    assert tnlm.report(model).parameters_after == tnlm.report(loaded).parameters_after


@pytest.mark.parametrize("formats", [("channel-ranks",), ("channels",)])
def test_the_error_in_few_bits_is_that_of_the_stored_weights(formats, make_model, monkeypatch):
    fitted = {}
    for kind in (RankedFeedForward, FeedForward):
        monkeypatch.setattr(kind, "fit", recording(kind.fit, fitted))
    scheme = dataclasses.replace(SCHEME, formats=formats, precision="int3")
    model = tnlm.compress(make_model("llama"), scheme, **ASKED, unit="bytes")
    plan = tnlm.report(model).plan
    for layer in plan.layers:
        if layer.format is None:
            continue
        found = fitted[layer.name]
        squared = found.error**2
        for target, _, module in found.pieces:
            if target.name in found.metrics:
                stored = matrix(model.get_submodule(target.module))
                noise = found.metrics[target.name].norm(stored - matrix(module))
                squared += noise**2 / found.size
        assert layer.error == pytest.approx(squared**0.5)
        assert layer.error > 1.05 * found.error
        assert len(found.metrics) == (3 if formats == ("channel-ranks",) else 1)


def test_a_plan_gives_the_errors_that_were_weighed_by_the_loss(make_model):
    asked = {**ASKED, "metric": "input"}
    direct = tnlm.compress(make_model("llama"), SCHEME, **asked)
    plan = tnlm.plan(make_model("llama"), SCHEME, **asked)
    again = tnlm.compress(make_model("llama"), plan, **DATA)
    assert torch.equal(logits(again), logits(direct))
    for ours, theirs in zip(*(tnlm.report(m).plan.layers for m in (again, direct)), strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-4)
    packed = tnlm.report(tnlm.compress(make_model("llama"), plan, precision="int8", **DATA)).plan
    assert {layer.error for layer in packed.layers if layer.format} == {None}


def test_loras_are_not_merged_into_narrowed_layers(cut):
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    with pytest.raises(OptionError, match="has lost channels as well; use on='factors'"):
        tnlm.heal(cut("llama"), [batch], rank=1, tokens=24, on="layers", merge="concatenate")


def recording(fit, found):
    def run(self, *args, **kwargs):
        found[self.name] = fit(self, *args, **kwargs)
        return found[self.name]

    return run


def test_every_layer_gets_the_same_share_without_data_on_the_loss(make_model):
    scheme = dataclasses.replace(SCHEME, allocation="even")
    model = tnlm.compress(make_model("llama"), scheme, **ASKED)
    report = tnlm.report(model)
    assert report.parameters_after == count(model)
    assert len({layer.after.params for layer in report.plan.layers}) == 1
    assert report.plan.targets_after.params <= 0.4 * report.plan.targets_before.params


@pytest.mark.parametrize(
    "formats", [("channels",), ("channel-ranks",), ("channel-ranks", "channels")]
)
def test_a_layer_that_keeps_its_channels_is_warned_of_once(formats, make_model, caplog):
    model = make_model("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.RMSNorm(48))
    scheme = dataclasses.replace(SCHEME, formats=formats)
    tnlm.plan(model, scheme, **ASKED | {"keep_targets": 0.8})
    assert caplog.text.count("1 of 2 feed-forward layers keep all their channels") == 1


def test_half_precision_keeps_its_dtype(make_model):
    model = tnlm.compress(make_model("llama").bfloat16(), SCHEME, **ASKED)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).isfinite().all()
    planned = tnlm.plan(make_model("llama").bfloat16(), SCHEME, **ASKED)
    for ours, theirs in zip(tnlm.report(model).plan.layers, planned.layers, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=0.02)


def test_a_plan_may_be_read_and_changed_by_hand(make_model):
    plan = tnlm.Plan.from_json(tnlm.plan(make_model("llama"), SCHEME, **ASKED).to_json())
    first = dataclasses.replace(
        plan.layers[0], spec={**plan.layers[0].spec, "width": 7, "ranks": [2, 7, 3]}
    )
    plan = dataclasses.replace(plan, layers=(first, *plan.layers[1:]))
    model = tnlm.compress(make_model("llama"), plan, **DATA)
    block = model.model.layers[0].mlp
    assert isinstance(block.gate_proj, nn.Linear)
    assert block.gate_proj.weight.shape == (7, 32)
    assert block.up_proj.network.shape == (7, 32)
    assert block.down_proj.network.sizes["r"] == 2
    assert tnlm.report(model).parameters_after == count(model)


@pytest.mark.parametrize(
    "spec",
    [
        {"width": 49},
        {"ranks": [1, 1]},
        {"ranks": [40, 1, 1]},
        {"sizes": [31, 32, 33]},
        {"width": 48, "ranks": [32, 32, 32]},
    ],
)
def test_an_impossible_plan_names_the_layer(spec, make_model):
    plan = tnlm.plan(make_model("llama"), SCHEME, **ASKED)
    changed = [dataclasses.replace(la, spec={**la.spec, **spec}) for la in plan.layers]
    with pytest.raises(OptionError, match=r"layers\.0\.mlp\.gate_proj"):
        tnlm.compress(make_model("llama"), dataclasses.replace(plan, layers=tuple(changed)), **DATA)


def test_layers_that_share_no_channels_stay_apart(make_model):
    model = make_model("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.RMSNorm(48))
    asked = {**ASKED, "keep_targets": 0.7}
    tnlm.compress(model, "auto", **asked)
    formats = {layer.name: layer.format for layer in tnlm.report(model).plan.layers}
    assert "model.layers.0.mlp.up_proj" in formats
    assert any("+" in name for name in formats)


BROKEN = {
    "more rows than the model": {"shape": [49, 32]},
    "no shape": {"shape": None},
    "a huge full shape": {"shape": [10**12, 32], "full": [10**12, 32]},
    "another cut": {"cut": "columns"},
    "an unknown format": {"format": "none"},
    "a rank above the shape": {"options": {"rank": 1000, "gauge": True}},
    "no options": {"options": None},
    "a bias": {"bias": True},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN.keys())
def test_an_entry_that_does_not_fit_is_an_error(changes, cut, tmp_path):
    directory = tnlm.save(cut("llama"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(n for n, entry in modules.items() if entry["kind"] == "narrowed" and "up" in n)
    modules[name].update(changes)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=name):
        tnlm.load(directory)
