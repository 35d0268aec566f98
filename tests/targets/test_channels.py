from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import OPTConfig, OPTForCausalLM

import tnlm
from tnlm.decompositions.channels import FORMAT, ChannelsSpec
from tnlm.errors import CheckpointError, OptionError
from tnlm.targets.channels import narrowable, pairs
from tnlm.targets.narrowed import sliced
from tnlm.targets.selection import select

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
MLP = r".*\.mlp\..*"
KINDS = ["llama", "tied-llama", "gpt2"]
UP = {"llama": "model.layers.1.mlp.up_proj", "gpt2": "transformer.h.1.mlp.c_fc"}
DOWN = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}

every_kind = pytest.mark.parametrize("kind", KINDS)
two_kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])


@pytest.fixture
def cut(compressed):
    """Compress the feed-forward layers of a model to half the channels, and nothing else."""
    return lambda kind: compressed(kind, "modegpt", targets=MLP, keep_targets=0.5)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def count(model):
    return sum(p.numel() for p in model.parameters())


def weight_of(model, name):
    """The weight as (out, in), whatever class holds it."""
    module = model.get_submodule(name)
    weight = module.weight.detach()
    return weight if isinstance(module, nn.Linear) else weight.T


def kept_rows(model, dense, name):
    """Which rows of the dense matrix are those of the sliced one; bit for bit."""
    rows = weight_of(dense, name)
    matches = [(rows == row).all(1).nonzero().flatten() for row in weight_of(model, name)]
    assert all(len(match) == 1 for match in matches)
    return torch.cat(matches)


# Which matrices make a pair


def test_pairs_are_found_where_all_matrices_are_targets(make_model):
    model = make_model("llama")
    [first, second] = pairs(model, select(model).targets)
    assert [m.name.rpartition(".")[2] for m in first.members] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    assert (first.shape, first.params, first.biases) == ((48, 32), 3 * 48 * 32, 0)
    assert second.module == DOWN["llama"]
    assert torch.equal(first.weight(model), model.model.layers[0].mlp.down_proj.weight.T)
    assert not pairs(model, select(model, ["up_proj", "down_proj"]).targets)
    assert len(pairs(model, select(model, r".*\.1\.mlp.*").targets)) == 1
    bert = make_model("bert")
    assert [p.shape for p in pairs(bert, select(bert).targets)] == [(48, 32)] * 2


def test_biases_of_producers_go_with_their_channels(make_model):
    model = make_model("gpt2")
    [first, _] = pairs(model, select(model).targets)
    assert (first.shape, first.params, first.biases) == ((48, 32), 2 * 48 * 32, 1)
    assert first.saved(20) == 28 * (2 * 32 + 1)
    assert torch.equal(first.weight(model), weight_of(model, first.consumer.name).T)


def test_matrices_that_stand_directly_in_a_block_make_a_pair():
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    assert [p.shape for p in pairs(model, select(model).targets)] == [(40, 16)] * 2
    tnlm.compress(model, "modegpt", keep_targets=0.6, **DATA)
    assert model.model.decoder.layers[0].fc1.bias.shape == (24,)
    expected = logits(model)
    assert tnlm.report(model).parameters_after == count(model)
    torch.testing.assert_close(logits(tnlm.to_dense(model)), expected)


def test_a_norm_between_the_matrices_is_no_pair(make_model):
    model = make_model("llama")
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.RMSNorm(48))  # as in BitNet
    found = narrowable(model, pairs(model, select(model).targets))
    assert [pair.consumer.name for pair in found] == [DOWN["llama"]]


# What a cut does


@every_kind
def test_producers_keep_rows_and_the_sliced_model_is_the_masked_one(kind, cut, make_model):
    dense, model = make_model(kind), cut(kind)
    for pair in pairs(dense, select(dense, MLP).targets):
        kept = kept_rows(model, dense, pair.producers[0].name)
        assert kept.tolist() == sorted(kept.tolist())
        assert len(kept) == 24
        for producer in pair.producers:
            assert torch.equal(kept_rows(model, dense, producer.name), kept)
            module = model.get_submodule(producer.name)
            assert isinstance(module, nn.Linear)
            if module.bias is not None:
                assert torch.equal(module.bias, dense.get_submodule(producer.name).bias[kept])
        reader = dense.get_submodule(pair.consumer.name)
        masked = pair.consumer.view(reader)
        masked.zero_()
        masked[:, kept] = weight_of(model, pair.consumer.name)
        made = model.get_submodule(pair.consumer.name)
        assert (made.bias is None) == (reader.bias is None)
        assert made.bias is None or torch.equal(made.bias, reader.bias)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


@two_kinds
def test_the_reader_is_least_squares_on_the_activations(kind, cut, make_model):
    dense, model, seen = make_model(kind), cut(kind), []
    reader = dense.get_submodule(DOWN[kind])
    reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    logits(dense, DATA["calibration"].reshape(-1, 32))
    [hidden] = seen
    kept, weight = kept_rows(model, dense, UP[kind]), weight_of(dense, DOWN[kind]).double()
    hidden = hidden.double()
    wanted = hidden @ weight.T
    best = torch.linalg.lstsq(hidden[:, kept], wanted).solution.T
    made = weight_of(model, DOWN[kind]).double()
    given, least = (float((hidden[:, kept] @ w.T - wanted).norm()) for w in (made, best))
    assert given <= least * (1 + 1e-4) + 1e-4 * float(wanted.norm())
    [layer] = [la for la in tnlm.report(model).plan.layers if DOWN[kind] in la.name]
    assert layer.error == pytest.approx(given / float(wanted.norm()), rel=1e-3)


def test_copies_of_channels_are_removed_without_a_trace(make_model):
    model = make_model("llama")
    for block in model.model.layers:
        for producer in (block.mlp.gate_proj, block.mlp.up_proj):
            producer.weight.data[24:] = producer.weight.data[:24]
    expected = logits(model)
    tnlm.compress(model, "modegpt", targets=MLP, keep_targets=0.5, **DATA)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    assert all(layer.error < 1e-3 for layer in tnlm.report(model).plan.layers)


@every_kind
def test_costs_are_those_of_the_model(kind, cut, make_model):
    dense, model = make_model(kind), cut(kind)
    record = tnlm.report(model).to_dict()
    assert record["parameters_after"] == count(model) < count(dense) == record["parameters_before"]
    assert record["bytes_after"] == sum(p.nbytes for p in model.parameters())

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            logits(model, IDS[:1])
        return counter.get_total_flops() // (2 * 12)

    assert record["macs_before"] - record["macs_after"] == flops(dense) - flops(model)
    for layer in tnlm.report(model).plan.layers:
        assert (layer.kind, layer.format, layer.spec) == ("channels", "channels", {"width": 24})
        assert layer.after.macs * 2 == layer.before.macs


def test_the_price_of_a_width_is_what_stays(make_model):
    model = make_model("gpt2")
    [pair, _] = pairs(model, select(model).targets)
    full = pair.cost(FORMAT.network(pair.shape, ChannelsSpec(48)), 4)
    assert full == pair.dense_cost(4)
    part = pair.cost(FORMAT.network(pair.shape, ChannelsSpec(10)), 2)
    assert part.params == 2 * 48 * 32 - 38 * 65
    assert part.bytes == 2 * part.params
    assert part.macs == 10 * 2 * 32


# Afterwards


@every_kind
def test_dense_again_it_is_an_ordinary_model_of_the_same_function(kind, cut, make_model):
    model, plain = cut(kind), make_model(kind)
    expected = logits(model)
    dense = tnlm.to_dense(model)
    assert [type(m) for m in dense.modules()] == [type(m) for m in plain.modules()]
    shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (dense, plain)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-6)


@two_kinds
def test_frozen_matrices_stay_frozen(kind, make_model):
    model = make_model(kind)
    model.get_submodule(UP[kind]).requires_grad_(False)
    tnlm.compress(model, "modegpt", targets=MLP, keep_targets=0.5, **DATA)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(UP[kind] + ".")}


@every_kind
def test_a_saved_model_is_the_same(kind, cut, tmp_path):
    model = cut(kind)
    directory = tnlm.save(model, tmp_path / "model")
    loaded = tnlm.load(directory)
    assert torch.equal(logits(loaded), logits(model))
    assert count(loaded) == count(model)
    dense = tnlm.to_dense(loaded)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-5, atol=1e-6)
    dense.save_pretrained(tmp_path / "dense")


@two_kinds
def test_a_plan_may_be_read_and_changed_by_hand(kind, make_model):
    asked = {"targets": MLP, "keep_targets": 0.5, **DATA}
    plan = tnlm.Plan.from_json(tnlm.plan(make_model(kind), "modegpt", **asked).to_json())
    first = dataclasses.replace(plan.layers[0], spec={"width": 7})
    plan = dataclasses.replace(plan, layers=(first, *plan.layers[1:]))
    model = tnlm.compress(make_model(kind), plan, **DATA)
    assert weight_of(model, UP[kind].replace("1", "0")).shape == (7, 32)
    assert tnlm.report(model).parameters_after == count(model)


@pytest.mark.parametrize("width", [0, 49, 48, 1.5])
def test_a_plan_of_an_impossible_width_names_the_layer(width, make_model):
    plan = tnlm.plan(make_model("llama"), "modegpt", targets=MLP, keep_targets=0.5, **DATA)
    layers = [dataclasses.replace(layer, spec={"width": width}) for layer in plan.layers]
    with pytest.raises(OptionError, match=r"layers\.0\.mlp\.gate_proj"):
        tnlm.compress(make_model("llama"), dataclasses.replace(plan, layers=tuple(layers)), **DATA)


# What is read from files


@pytest.fixture
def saved(cut, tmp_path):
    return tnlm.save(cut("llama"), tmp_path / "model")


def edit(directory, name, **changes):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["modules"][name].update(changes)
    (directory / "config.json").write_text(json.dumps(config))


HUGE = 10**12
BROKEN = {
    "larger than the model": {"shape": [49, 32]},
    "larger all over": {"shape": [96, 32], "full": [96, 32]},
    "huge": {"shape": [HUGE, 32], "full": [HUGE, 32]},
    "huge in part": {"shape": [HUGE, 32]},
    "another cut": {"cut": "columns"},
    "an unknown cut": {"cut": "diagonal"},
    "a cut that is a number": {"cut": 0},
    "a cut that is a list": {"cut": ["rows"]},
    "no full shape": {"full": None},
    "a full shape of one": {"full": [48]},
    "a full shape of words": {"full": ["48", "32"]},
    "no rows": {"shape": [0, 32]},
    "other columns": {"shape": [24, 31]},
    "a bias": {"bias": True},
    "a strange bias": {"bias": "no"},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN.keys())
def test_an_entry_that_does_not_fit_is_an_error(changes, saved):
    edit(saved, UP["llama"], **changes)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        tnlm.load(saved)


def test_an_entry_for_a_table_is_an_error(saved):
    config = json.loads((saved / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.embed_tokens"] = {**modules[UP["llama"]], "shape": [24, 32], "full": [64, 32]}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="embed_tokens"):
        tnlm.load(saved)


def test_weights_of_another_width_than_the_entry_are_an_error(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors[f"{UP['llama']}.weight"] = torch.ones(23, 32)
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        tnlm.load(saved)


def test_every_row_of_a_producer_is_a_row_of_the_dense_one(make_model):
    model = make_model("gpt2")
    [pair, _] = pairs(model, select(model).targets)
    rows = torch.randn(3, 32, dtype=torch.float64)
    kept = torch.tensor([4, 9, 40])
    (producer, entry, module), (reader, other, last) = sliced(
        pair, model, {"kept": kept, "rows": rows}
    )
    assert (producer, reader) == pair.members
    assert torch.equal(module.weight, producer.weight(model)[kept])
    assert torch.equal(module.bias, producer.bias(model)[kept])
    assert torch.equal(last.weight, rows.T.float())
    assert torch.equal(last.bias, reader.bias(model))
    assert (entry["shape"], entry["full"], entry["cut"]) == ([3, 32], [48, 32], "rows")
    assert (other["shape"], other["full"], other["cut"]) == ([32, 3], [32, 48], "columns")
