"""Fused modules are taken apart by the matrices that they hold, and put together again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tnlm
from tests.targets.families import make
from tnlm.checkpoint.entries import build, check_entry, dense_module
from tnlm.errors import CheckpointError, TargetError
from tnlm.layers.fused import FusedLinear, Layout, joined
from tnlm.targets.channels import pairs
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.parts import fused_layouts
from tnlm.targets.selection import select

DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}
IDS = torch.arange(24).reshape(2, 12) % 61 + 3
QKV = ("q", "k", "v")
LAYOUTS = {
    "gpt2": ("transformer.h.0.attn.c_attn", Layout(QKV, (32, 32, 32))),
    "mpt": ("transformer.blocks.0.attn.Wqkv", Layout(QKV, (32, 32, 32))),
    "phi3": ("model.layers.0.self_attn.qkv_proj", Layout(QKV, (32, 16, 16))),
    "modernbert": ("model.layers.0.attn.Wqkv", Layout(QKV, (32, 32, 32))),
    "gpt_neox": ("gpt_neox.layers.0.attention.query_key_value", Layout(QKV, (32, 32, 32), 4)),
    "bloom": ("transformer.h.0.self_attention.query_key_value", Layout(QKV, (32, 32, 32), 4)),
    "falcon": ("transformer.h.0.self_attention.query_key_value", Layout(QKV, (32, 8, 8))),
    "new-falcon": ("transformer.h.0.self_attention.query_key_value", Layout(QKV, (32, 16, 16), 2)),
    "old-falcon": ("transformer.h.0.self_attention.query_key_value", Layout(QKV, (32, 32, 32), 4)),
    "codegen": ("transformer.h.0.attn.qkv_proj", Layout(("q", "v", "k"), (32, 32, 32), 4)),
    "bigcode": ("transformer.h.0.attn.c_attn", Layout(QKV, (32, 8, 8))),
    "headed-bigcode": ("transformer.h.0.attn.c_attn", Layout(QKV, (32, 32, 32), 4)),
    "persimmon": ("model.layers.0.self_attn.query_key_value", Layout(QKV, (32, 32, 32), 4)),
}
GATES = {
    "phi3": "model.layers.0.mlp.gate_up_proj",
    "glm4": "model.layers.0.mlp.gate_up_proj",
    "modernbert": "model.layers.0.mlp.Wi",
    "granite": "model.layers.0.shared_mlp.input_linear",
}
READERS = {"modernbert": "Wo", "granite": "output_linear"}


def output(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


def with_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def of_rank(model, rank):
    """Give every part of every fused module, and all other targets, a low rank."""
    for target in select(model).targets:
        module = model.get_submodule(target.module)
        left, values, right = torch.linalg.svd(target.weight(model), full_matrices=False)
        low = left[:, :rank] * values[:rank] @ right[:rank]
        target.write(module, module.weight.detach(), low)
    return model


# Layouts


@pytest.mark.parametrize("family", LAYOUTS)
def test_layouts_of_queries_keys_and_values(family):
    name, layout = LAYOUTS[family]
    model = make(family)
    assert fused_layouts(model)[name] == layout
    targets = select(model, [name.rpartition(".")[2]]).targets
    assert [t.name for t in targets[:3]] == [f"{name}.{part}" for part in layout.parts]


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_single_token_depends_on_values_alone(family):
    """It attends to itself, whatever its query and key are."""
    model = make(family)
    ids = torch.tensor([[5]])
    before = output(model, ids)
    for target in select(model, [LAYOUTS[family][0].rpartition(".")[2]]).targets:
        changed = copy.deepcopy(model)
        module = changed.get_submodule(target.module)
        target.write(module, module.weight.detach(), target.weight(changed) * -2.0)
        same = torch.allclose(output(changed, ids), before, atol=1e-6)
        assert same == (not target.name.endswith(".v")), target.name


@pytest.mark.parametrize("family", GATES)
def test_gates_and_values_are_parts(family):
    model = make(family)
    assert fused_layouts(model)[GATES[family]] == Layout(("gate", "up"), (48, 48))


def test_shapes_that_no_heads_explain_are_one_matrix():
    model = make("phi3")
    model.model.layers[0].self_attn.qkv_proj = nn.Linear(32, 72)
    assert "model.layers.0.self_attn.qkv_proj" not in fused_layouts(model)


@pytest.mark.parametrize("layout", [Layout(QKV, (4, 2, 2)), Layout(QKV, (4, 2, 2), 2)])
def test_parts_join_to_the_whole(layout):
    whole = torch.arange(24).reshape(8, 3)
    parts = [whole[layout.rows(part)] for part in range(3)]
    assert [len(part) for part in parts] == [4, 2, 2]
    runs = layout.runs if layout.groups > 1 else ()
    assert torch.equal(joined(parts, runs, 0), whole)
    assert torch.equal(joined([part.T for part in parts], runs), whole.T)


# What becomes of them


@pytest.mark.parametrize("family", [*LAYOUTS, "glm4", "granite"])
def test_parts_of_low_rank_are_exact(family, tmp_path):
    dense = of_rank(with_biases(make(family)), 3)
    model, expected = copy.deepcopy(dense), output(dense)
    names = [name.rpartition(".")[2] for name in fused_layouts(model)]
    tnlm.compress(model, "svd", targets=list(dict.fromkeys(names)), rank=3, progress=False)
    layers = tnlm.report(model).plan.layers
    assert {layer.format for layer in layers} == {"low-rank"}
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model"))
    assert torch.equal(output(loaded), output(model))
    again = tnlm.to_dense(loaded)
    assert [type(m).__name__ for m in again.modules()] == [
        "Linear" if type(m).__name__ == "FalconLinear" and n.endswith("query_key_value")
        else type(m).__name__ for n, m in dense.named_modules()
    ]  # fmt: skip
    torch.testing.assert_close(output(again), expected, rtol=1e-4, atol=1e-5)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", GATES)
def test_gates_and_values_lose_the_same_channels(family, tmp_path):
    dense = make(family)
    model = copy.deepcopy(dense)
    name = GATES[family]
    parent = name.rpartition(".")[0]
    words = [name.rpartition(".")[2], READERS.get(family, "down_proj")]
    if family == "modernbert":
        words[1] = "mlp.Wo"
    tnlm.compress(model, "modegpt", targets=words, keep_targets=0.5, **DATA)
    made = model.get_submodule(name)
    assert isinstance(made, nn.Linear)
    assert made.weight.shape == (48, 32)
    entry = model.config.quantization_config.modules[name]
    assert (entry["kind"], entry["full"], entry["slabs"]) == ("sliced", [96, 32], 2)
    kept = [find(row, dense.get_submodule(name).weight) for row in made.weight]
    assert [row + 48 for row in kept[:24]] == kept[24:]
    reader = f"{parent}.{words[1].rpartition('.')[2]}"
    masked = dense.get_submodule(reader).weight.data
    masked.zero_()
    for block in range(2):
        at = name.replace("0", str(block)), reader.replace("0", str(block))
        weight = dense.get_submodule(at[1]).weight.data.zero_()
        rows = model.get_submodule(at[0]).weight[:24]
        kept = [find(row, dense.get_submodule(at[0]).weight) for row in rows]
        weight[:, kept] = model.get_submodule(at[1]).weight.data
    torch.testing.assert_close(output(model), output(dense), rtol=1e-4, atol=1e-5)
    assert tnlm.report(model).parameters_after == sum(p.numel() for p in model.parameters())
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model"))
    assert torch.equal(output(loaded), output(model))
    again = tnlm.to_dense(loaded)
    assert again.get_submodule(name).weight.shape == (96, 32)
    torch.testing.assert_close(output(again), output(model), rtol=1e-4, atol=1e-5)


def find(row, weight):
    (match,) = (weight == row).all(1).nonzero().flatten().tolist()
    return match


class Interleaved(nn.Module):
    """A feed-forward layer whose gates and values alternate, with a bias."""

    def __init__(self):
        super().__init__()
        self.both, self.back = nn.Linear(32, 96), nn.Linear(48, 32)
        nn.init.normal_(self.both.bias)

    def forward(self, x):
        hidden = self.both(x)
        return self.back(F.silu(hidden[..., ::2]) * hidden[..., 1::2])


def test_interleaved_gates_and_values(tiny_llama):
    torch.manual_seed(0)
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = Interleaved()
    name = "model.layers.0.mlp.both"
    assert fused_layouts(model)[name] == Layout(("gate", "up"), (48, 48), 48)
    dense = of_rank(copy.deepcopy(model), 3)
    low = tnlm.compress(copy.deepcopy(dense), "svd", targets=["both"], rank=3, progress=False)
    torch.testing.assert_close(output(low), output(dense), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output(tnlm.to_dense(low)), output(dense), rtol=1e-4, atol=1e-5)

    narrow = tnlm.compress(
        copy.deepcopy(model), "modegpt", targets=["both", "back"], keep_targets=0.5, **DATA
    )
    made, own = narrow.get_submodule(name), model.get_submodule(name)
    kept = [find(row, own.weight) for row in made.weight]
    assert [row + 1 for row in kept[::2]] == kept[1::2]
    assert torch.equal(made.bias, own.bias[kept])
    expected = output(narrow)
    again = tnlm.to_dense(narrow)
    assert torch.equal(again.get_submodule(name).weight[:48], made.weight)
    torch.testing.assert_close(output(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["auto", "lora-svd", "aa-svd", "kron", "fwsvd"])
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_schemes_take_parts(family, scheme, tmp_path):
    model = make(family)
    tnlm.compress(model, scheme, keep_targets=0.6, **(DATA if scheme != "kron" else {}))
    assert tnlm.report(model).parameters_after == sum(p.numel() for p in model.parameters())
    expected = output(model)
    assert torch.equal(output(tnlm.load(tnlm.save(model, tmp_path / "model"))), expected)
    torch.testing.assert_close(output(tnlm.to_dense(model)), expected, rtol=1e-3, atol=1e-4)


def test_refined_channels_of_a_fused_module_keep_what_they_learned():
    model, plain = make("phi3"), make("phi3")
    asked = {"targets": ["gate_up_proj", "down_proj"], "keep_targets": 0.5, **DATA}
    tnlm.compress(plain, "modegpt", **asked)
    tnlm.compress(model, "modegpt", refine=256, **asked)
    name = GATES["phi3"]
    made, before = model.get_submodule(name), plain.get_submodule(name)
    assert isinstance(made, nn.Linear)
    assert made.weight.shape == before.weight.shape
    assert not torch.equal(made.weight, before.weight)


# Names


def test_a_part_may_be_chosen_or_ignored_by_name():
    model = make("phi3")
    first = "model.layers.0.self_attn.qkv_proj"
    assert [t.name for t in select(model, [f"{first}.q"]).targets] == [f"{first}.q"]
    assert len(select(model, ["qkv_proj.k", "up"]).targets) == 4
    assert len(select(model, r".*qkv_proj\.[qk]").targets) == 4
    ignored = select(model, ["qkv_proj"], ignore=["qkv_proj.v"])
    assert [t.name[-1] for t in ignored.targets] == ["q", "k"] * 2
    assert len(select(model, ["qkv_proj"]).targets) == 6
    with pytest.raises(TargetError, match="ignore"):
        select(model, ignore=["qkv_proj.w"])


def test_parts_that_are_not_chosen_stay_as_they_are(tmp_path):
    dense, model = make("phi3"), make("phi3")
    tnlm.compress(model, "svd", targets=["qkv_proj.k"], rank=4, progress=False)
    fused = model.model.layers[0].self_attn.qkv_proj
    own = dense.model.layers[0].self_attn.qkv_proj.weight
    assert isinstance(fused, FusedLinear)
    assert torch.equal(fused.q.weight, own[:32])
    assert torch.equal(fused.v.weight, own[48:])
    report = tnlm.report(model)
    assert [layer.name.rpartition(".")[2] for layer in report.plan.layers] == ["k", "k"]
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert torch.equal(output(tnlm.load(tnlm.save(model, tmp_path / "m"))), output(model))


def test_a_fused_module_may_be_one_matrix():
    model = make("phi3")
    plan = tnlm.plan(model, "svd", split=False, keep_targets=0.6, progress=False)
    assert "model.layers.0.self_attn.qkv_proj" in [layer.name for layer in plan.layers]
    again = tnlm.Plan.from_json(json.dumps(json.loads(plan.to_json())))
    tnlm.compress(model, again, progress=False)
    assert model.model.layers[0].self_attn.qkv_proj.network.shape == (64, 32)


def test_one_matrix_of_gates_and_values_loses_channels_too():
    dense, model = make("phi3"), make("phi3")
    [first, _] = pairs(model, select(model, ["gate_up_proj", "down_proj"], split=False).targets)
    assert (first.params, len(first.producers)) == (3 * 48 * 32, 1)
    asked = {"targets": ["gate_up_proj", "down_proj"], "keep_targets": 0.5, **DATA}
    tnlm.compress(model, "modegpt", split=False, **asked)
    other = tnlm.compress(dense, "modegpt", **asked)
    assert torch.equal(output(model), output(other))
    torch.testing.assert_close(output(tnlm.to_dense(model)), output(other), rtol=1e-4, atol=1e-5)


def test_a_model_made_from_scratch_has_the_same_parts():
    config = make("phi3").config
    model = tnlm.from_config(config, "svd", keep_targets=0.5)
    fused = model.model.layers[0].mlp.gate_up_proj
    assert fused.parts == ("gate", "up")
    tnlm.from_config(config, "svd", targets=["qkv_proj.q"], rank=4)


# What is read from files


def entry_of(target, rows):
    parts = [
        {"name": name, "kind": "dense", "shape": [size, 6], "bias": True}
        for name, size in zip(target.layout.parts, rows, strict=True)
    ]
    return {"kind": "fused", "parts": parts, "runs": list(target.layout.runs)}


def test_runs_are_checked():
    target = MatrixTarget("m", "m", (16, 6), layout=Layout(("q", "k"), (8, 8), 4))
    module = nn.Linear(6, 16)
    entry = entry_of(target, (8, 8))
    check_entry("m", entry, module)
    built = build(entry)
    layer = dense_module(entry, built)
    x = torch.randn(3, 6)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
        layer = dense_module(entry, built)
        torch.testing.assert_close(layer(x), built(x))
    for runs in ([2], [2, 3], [0, 2], [2, 4], ["2", 2], [2.0, 2], 2, None):
        with pytest.raises(CheckpointError, match="m"):
            check_entry("m", {**entry, "runs": runs}, module)


@pytest.mark.parametrize("parts", [0, 3, -2, 2.0, "2", None, [2]])
def test_parts_of_a_slice_are_checked(parts):
    entry = {"kind": "sliced", "shape": [8, 6], "full": [16, 6], "cut": "rows", "bias": True}
    check_entry("m", {**entry, "slabs": 2}, nn.Linear(6, 16))
    with pytest.raises(CheckpointError, match="m"):
        check_entry("m", {**entry, "slabs": parts}, nn.Linear(6, 16))


def test_nothing_is_run_where_no_matrix_could_hold_gates(make_model, monkeypatch):
    monkeypatch.setattr("tnlm.targets.parts.feed_forward_layers", None)
    assert fused_layouts(make_model("llama")) == {}
