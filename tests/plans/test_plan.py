from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import tnlm
from tnlm.errors import CheckpointError, OptionError
from tnlm.plans.plan import LayerPlan, Plan
from tnlm.tensors.network import Cost

COST = Cost(100, 400, 100)
LAYER = LayerPlan("a.b", "linear", (10, 10), "low-rank", {"rank": 2}, COST, Cost(36, 184, 36), 0.5)
DENSE = LayerPlan("a.c", "linear", (10, 10), None, {}, COST, COST, note="it is too small")
TABLE = LayerPlan(
    "e", "embedding", (10, 10), "low-rank", {"rank": 2, "gauge": False},
    Cost(100, 400, 0), Cost(40, 160, 20),
)  # fmt: skip
PLAN = Plan(
    "svd", "identity", {"rank": 2}, (LAYER, DENSE, TABLE), Cost(1000, 4000, 900), {"x": "y"}
)


def test_totals_are_sums_and_the_rest_of_the_model_stays():
    assert PLAN.targets_before == Cost(300, 1200, 200)
    assert PLAN.targets_after == Cost(176, 744, 156)
    assert PLAN.model_after == Cost(876, 3544, 856)
    assert LAYER.keep == 0.36


def test_json_gives_the_plan_back():
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert again.layers[0].shape == (10, 10)
    assert again.to_json() == PLAN.to_json()


def test_a_file_gives_the_plan_back(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(str(tmp_path / "plan.json")) == PLAN


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.json cannot be read"):
        Plan.load(tmp_path / "nothing.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"plan\.json cannot be read"):
        Plan.load(tmp_path / "plan.json")


def changed(**changes):
    data = json.loads(PLAN.to_json())
    data.update(changes)
    return json.dumps({key: value for key, value in data.items() if value is not ...})


def layer(**changes):
    data = json.loads(PLAN.to_json())["layers"][0] | changes
    return changed(layers=[{k: v for k, v in data.items() if v is not ...}])


BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "no version": json.dumps({"layers": []}),
    "a later version": changed(format_version=99),
    "an unknown field": changed(colour="red"),
    "layers that are none": changed(layers=None),
    "a layer that is a number": changed(layers=[3]),
    "a model that is a number": changed(model=3),
    "an unknown field in a layer": layer(colour="red"),
    "a layer without cost": layer(before={"params": 3}),
    "a layer without a shape": layer(shape=[]),
    "a shape of words": layer(shape=["a", "b"]),
    "a shape of three": layer(shape=[1, 2, 3]),
    "a spec that is a list": layer(spec=[1]),
    "a name that is a number": layer(name=3),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_what_is_no_plan_is_an_error(text):
    with pytest.raises(OptionError, match=r"not a tnlm plan|not have format_version 2"):
        Plan.from_json(text)


def test_the_table_shows_every_target_and_the_totals():
    lines = str(PLAN).splitlines()
    assert lines[0].split() == ["target", "shape", "format", "spec", "params", "MACs", "error"]
    assert lines[1].split() == ["a.b", "10x10", "low-rank", "rank=2", "0.360", "0.360", "0.5000"]
    assert "it is too small" in lines[2]
    assert "rank=2 gauge=false" in lines[3]
    assert "params 300 -> 176 (0.587)" in lines[4]
    assert "params 1,000 -> 876 (0.876)" in lines[5]
    assert lines[6] == "skipped: x: y"


def test_predicted_errors_stand_in_the_table(make_model):
    plan = tnlm.plan(make_model("llama"), "svd", rank=8, targets=["q_proj"])
    assert all(0 < layer.error < 1 for layer in plan.layers)
    assert f"{plan.layers[0].error:.4f}" in str(plan)


def test_a_plan_may_leave_out_what_is_to_stay(make_model):
    plan = tnlm.plan(make_model("llama"), "svd", rank=4)
    kept = [layer for layer in plan.layers if "mlp" in layer.name]
    model = tnlm.compress(make_model("llama"), dataclasses.replace(plan, layers=tuple(kept)))
    report = tnlm.report(model)
    assert [la.name for la in report.plan.layers] == [la.name for la in kept]
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


def test_a_plan_may_be_changed_by_hand(make_model):
    plan = json.loads(tnlm.plan(make_model("llama"), "svd", rank=4).to_json())
    plan["layers"][0]["spec"]["rank"] = 6
    plan["layers"][1].update(format="kronecker")
    plan["layers"][1]["spec"] = {"terms": 2, "out_split": [4, 4], "in_split": [4, 8]}
    plan["layers"][2].update(format=None, spec={})
    model = tnlm.compress(make_model("llama"), Plan.from_json(json.dumps(plan)))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.right.out_features == 6
    assert attention.k_proj.network.out == "ab"
    assert type(attention.v_proj).__name__ == "Linear"
    report = tnlm.report(model)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


def test_a_part_of_a_fused_module_that_is_left_out_stays_as_it_is(make_model):
    dense, model = make_model("gpt2"), make_model("gpt2")
    plan = tnlm.plan(model, "svd", rank=4)
    some = tuple(layer for layer in plan.layers if not layer.name.endswith("c_attn.k"))
    tnlm.compress(model, dataclasses.replace(plan, layers=some))
    fused, own = (m.transformer.h[0].attn.c_attn for m in (model, dense))
    assert torch.equal(fused.k.weight, own.weight[:, 32:64].T)
    assert torch.equal(fused.k.bias, own.bias[32:64])
    assert fused.q.right.out_features == 4


@pytest.mark.parametrize(
    "change",
    [
        {"format": "lowrank"},
        {"format": "token-mps", "spec": {"in_split": [4, 8], "ranks": [1]}},
        {"spec": {"rank": 99}},
        {"spec": {"rank": 32}},
        {"spec": {}},
        {"spec": {"rank": 1.5}},
    ],
)
def test_a_plan_with_an_impossible_spec_is_an_error_that_names_it(change, make_model):
    plan = tnlm.plan(make_model("llama"), "svd", rank=4, targets=["q_proj"])
    last = dataclasses.replace(plan.layers[-1], **change)
    plan = dataclasses.replace(plan, layers=(*plan.layers[:-1], last))
    with pytest.raises(OptionError, match=r"layers\.1\.self_attn\.q_proj"):
        tnlm.compress(make_model("llama"), plan)
