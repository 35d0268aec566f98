from __future__ import annotations

import math

import pytest
import torch

import tnlm
from tnlm.allocation.base import Limits
from tnlm.allocation.uniform import options_for
from tnlm.decompositions.stack_tucker import FORMAT, StackTuckerSpec
from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.targets import usable_targets
from tnlm.targets.channels import pairs
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.selection import select
from tnlm.targets.tensor_stacks import TensorStack, across_blocks

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}
PLAIN = {"metric": "identity", "allocation": "uniform", "progress": False}
KINDS = ["llama", "gpt2", "masked-bert"]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def count(model):
    return sum(p.numel() for p in model.parameters())


def block(layer, name, shape=(8, 4)):
    return MatrixTarget(f"h.{layer}.{name}", f"h.{layer}.{name}", shape)


def stacked(report):
    return [layer for layer in report.plan.layers if layer.format == "stack-tucker"]


@pytest.mark.parametrize(("layers", "found"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_the_same_matrix_of_every_two_blocks_is_a_stack(layers, found):
    stacks = across_blocks(None, [block(i, "up") for i in range(layers)])
    assert [stack.name for stack in stacks] == [
        f"h.{2 * i}.up+h.{2 * i + 1}.up" for i in range(found)
    ]


def test_what_is_of_another_shape_or_in_no_block_stays_by_itself():
    alone = [block(0, "up", (8, 4)), block(1, "up", (6, 4)), MatrixTarget("head", "head", (8, 4))]
    assert across_blocks(None, alone) == []


def test_two_joint_targets_never_share_a_matrix(make_model):
    model = make_model("llama")
    targets = select(model).targets
    found = [*pairs(model, targets), *across_blocks(model, targets)]
    used = usable_targets(model, found, {"channels", "stack"})
    names = [member.name for each in used for member in each.members]
    assert len(names) == len(set(names)) == len(targets)
    assert {each.kind for each in used} == {"channels", "stack"}
    only = usable_targets(model, found, {"stack"})
    assert len(only) == len(targets) // 2


def test_the_metric_is_that_of_every_member(gaussian):
    stack = TensorStack("a+b", "a", (16, 4), (block(0, "up"), block(1, "up")))
    sides = {"h.0.up": Side(torch.ones(4)), "h.1.up": Side(torch.ones(4) * 4)}
    metric = stack.metric(lambda member: Metric(inputs=sides[member.name]))
    error = gaussian(16, 4)
    assert metric.norm(error) ** 2 == pytest.approx(
        float(error[:8].square().sum() + 4 * error[8:].square().sum())
    )


@pytest.mark.parametrize("ranks", [(2, 6, 3), (2, 3, 4), (2, 5, 3), (1, 3, 3)])
@pytest.mark.parametrize("gauge", [True, False])
def test_costs_are_those_of_all_members(ranks, gauge):
    stack = TensorStack("a+b", "a", (16, 4), (block(0, "up"), block(1, "up")))
    spec = StackTuckerSpec(ranks, 2, 2, gauge)
    network, one = (
        FORMAT.network((16, 4), spec),
        FORMAT.network((8, 4), StackTuckerSpec(ranks, 1, 2, gauge)),
    )
    cost = stack.cost(network, itemsize=4)
    shared = sum(
        math.prod(network.shape_of(name)) for name, m in network.factors.items() if "a" not in m
    )
    saved = 0 if network.gauge is None else network.sizes[network.gauge.bond] ** 2
    assert cost.params == network.params == 2 * one.params - shared + saved
    assert cost.bytes == 4 * cost.params + 2 * one.index_bytes


def test_the_target_decides_how_many_slices_there_are():
    stack = TensorStack("a+b", "a", (16, 4), (block(0, "up"), block(1, "up")))
    options = options_for(stack, FORMAT, Limits(0.5, options={"ranks": (2, 3, 4), "rank": 3}))
    assert options == {"ranks": (2, 3, 4), "slices": 2, "stack": 2}


# What a fit gives


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gauge", [True, False])
def test_shared_factors_are_one_parameter_and_counted_once(kind, gauge, make_model):
    model = make_model(kind)
    before = count(model)
    tnlm.compress(model, "stack-tucker", keep_targets=0.5, gauge=gauge, **PLAIN)
    report = tnlm.report(model)
    assert report.parameters_after == count(model) < before
    assert stacked(report)
    for layer in stacked(report):
        spec = StackTuckerSpec(**{**layer.spec, "ranks": tuple(layer.spec["ranks"])})
        network = FORMAT.network(layer.shape, spec)
        first, second = (model.get_submodule(name) for name in layer.name.split("+"))
        for name, modes in network.factors.items():
            same = getattr(first, name).weight is getattr(second, name).weight
            assert same == ("a" not in modes)
        macs = first.macs + second.macs
        assert layer.after.macs == macs
        assert layer.error < 1
    stored = sum(
        b.numel() * b.element_size() for n, b in model.named_buffers() if n.endswith("_order")
    )
    assert report.plan.targets_after.bytes == 4 * report.plan.targets_after.params + stored


@pytest.mark.parametrize("kind", KINDS)
def test_it_saves_and_loads_bit_for_bit(kind, compressed, tmp_path):
    model = compressed(kind, "stack-tucker", keep_targets=0.5)
    assert stacked(tnlm.report(model))
    loaded = tnlm.load(tnlm.save(model, tmp_path / "saved"))
    assert torch.equal(logits(loaded), logits(model))
    assert count(loaded) == count(model)
    dense = tnlm.to_dense(loaded)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arguments", [DATA, DATA | {"metric": "input"}, PLAIN])
def test_the_error_reported_is_the_measured_one(arguments, make_model, compressed):
    dense = make_model("llama")
    if arguments is DATA:
        model = compressed("llama", "stack-tucker", keep_targets=0.5)
    else:
        model = tnlm.compress(make_model("llama"), "stack-tucker", keep_targets=0.5, **arguments)
    planned = tnlm.plan(dense, "stack-tucker", keep_targets=0.5, **arguments)
    predicted = {layer.name: layer.error for layer in planned.layers}
    found = stacked(tnlm.report(model))
    assert found
    for layer in found:
        assert layer.error <= predicted[layer.name] + 1e-6
        if arguments is PLAIN:
            names = layer.name.split("+")
            weight, approximation = (
                torch.cat([m.get_submodule(n).weight.detach() for n in names])
                for m in (dense, model)
            )
            assert layer.error == pytest.approx(Metric().relative(weight, approximation), rel=1e-4)


def test_the_allocation_leaves_alone_what_a_stack_does_not_help(make_model):
    model = make_model("llama")
    with torch.no_grad():  # q of rank 1 in both blocks, in directions that they do not share
        for index, layer in enumerate(model.model.layers):
            weight = torch.zeros_like(layer.self_attn.q_proj.weight)
            weight[index, index] = 1.0
            layer.self_attn.q_proj.weight.copy_(weight)
    plan = tnlm.plan(model, "stack-tucker", keep_targets=0.5, **DATA)
    formats = {layer.name: layer.format for layer in plan.layers}
    assert formats["model.layers.0.self_attn.q_proj"] == "low-rank"


def test_a_plan_is_carried_out_as_it_was_made(make_model):
    plan = tnlm.plan(make_model("llama"), "stack-tucker", keep_targets=0.5, **PLAIN)
    again = type(plan).from_json(plan.to_json())
    model = tnlm.compress(make_model("llama"), again, progress=False)
    direct = tnlm.compress(make_model("llama"), "stack-tucker", keep_targets=0.5, **PLAIN)
    assert torch.equal(logits(model), logits(direct))


def test_frozen_and_trained_matrices_stay_so(make_model):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.requires_grad_(False)
    tnlm.compress(model, "stack-tucker", keep_targets=0.5, **PLAIN)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("up_proj" not in name), name
    model(IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_refining_keeps_what_is_shared(make_model):
    model = tnlm.compress(make_model("llama"), "stack-tucker", keep_targets=0.5, refine=64, **DATA)
    found = stacked(tnlm.report(model))
    assert found
    for layer in found:
        first, second = (model.get_submodule(name) for name in layer.name.split("+"))
        for name in ("mode1", "mode2"):
            if hasattr(first, name):
                assert getattr(first, name).weight is getattr(second, name).weight


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"cascade": "sequential"}, "replaces several matrices together"),
        ({"metric": "centered"}, "replaces several matrices together"),
        ({"slices": 2}, "unknown option 'slices'"),
        ({"share": 2}, "share=2"),
        ({"metric": "fisher-elements"}, "stack-tucker"),
    ],
)
def test_what_a_stack_cannot_have_is_refused(arguments, why, make_model):
    with pytest.raises(OptionError, match=why):
        tnlm.compress(make_model("llama"), "stack-tucker", **DATA, **arguments)
