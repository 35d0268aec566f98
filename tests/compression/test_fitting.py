from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import tnlm
from tnlm.compression.choices import Calibration
from tnlm.compression.fitting import Fitting, by_module
from tnlm.compression.job import prepare
from tnlm.compression.moments import Moved
from tnlm.compression.pipeline import settle
from tnlm.compression.request import make_request
from tnlm.layers.fused import FusedLinear
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.swap import Shelf
from tnlm.targets.selection import select

IDS = torch.arange(256) % 61 + 3
NO_DATA = Calibration()
DATA = Calibration(IDS, num_samples=8, max_length=32)


@pytest.fixture
def start(make_model):
    """Prepare a scheme on a model; the plan may be changed before anything is fitted."""
    shelf = Shelf()

    def begin(kind, scheme, change=lambda layer: layer, targets=None, **options):
        model = make_model(kind)
        request = make_request(scheme, **options)
        data = DATA if request.looks_at_data else NO_DATA
        job = prepare(model, request, targets, None, data, progress=False)
        plan = settle(model, job, predict=False, progress=False)
        layers = tuple(change(layer) for layer in plan.layers)
        plan = dataclasses.replace(plan, layers=layers)
        return model, job, plan, shelf, Fitting(model, job, plan, shelf)

    return begin


def left_dense(*endings):
    def change(layer):
        dense = dataclasses.replace(layer, format=None, spec={}, after=layer.before)
        return dense if layer.name.endswith(endings) else layer

    return change


def snapshot(model):
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return values, [(name, id(module)) for name, module in model.named_modules()]


def is_as_before(model, before):
    values, modules = snapshot(model)
    same = all(torch.equal(values[name], before[0][name]) for name in before[0])
    return same and values.keys() == before[0].keys() and modules == before[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["svd", "svd-llm", "basis-sharing", "modegpt", "afm"])
def test_the_model_waits_and_the_shelf_fills(kind, scheme, start):
    model, job, plan, shelf, fitting = start(kind, scheme)
    before = snapshot(model)
    assert [unit.name for unit in fitting.units] == [layer.name for layer in plan.layers]
    for unit in fitting.units:
        assert fitting.fit(unit) is None
    assert is_as_before(model, before)
    names = {member.name for unit in fitting.units for member in unit.members}
    assert fitting.entries.keys() == names
    assert fitting.errors.keys() == {layer.name for layer in plan.layers}
    assert all(0 < error < 1 for error in fitting.errors.values())
    for target in job.selection.targets:
        made = shelf.take(target.name)
        assert made.weight.shape == target.shape or fitting.entries[target.name]["kind"] == "sliced"


def test_what_stays_dense_is_not_touched_unless_its_module_is_replaced(start):
    change = left_dense("c_attn.q", "h.0.mlp.c_fc", "h.1.attn.c_attn.k", "h.1.attn.c_attn.v")
    model, _, _, shelf, fitting = start("gpt2", "svd", change)
    for unit in fitting.units:
        fitting.fit(unit)
    assert "transformer.h.0.mlp.c_fc" not in fitting.entries
    assert "transformer.h.0.mlp.c_fc" not in fitting.errors
    kinds = {name: entry["kind"] for name, entry in fitting.entries.items() if "c_attn" in name}
    name = "transformer.h.{}.attn.c_attn".format
    # All parts of the second block's module stay dense, so that it stays what it is.
    assert kinds == {f"{name(0)}.q": "dense", f"{name(0)}.k": "linear", f"{name(0)}.v": "linear"}
    part = shelf.take(f"{name(0)}.q")
    assert isinstance(part, nn.Linear)
    target = select(model, [name(0)]).targets[0]
    assert torch.equal(part.weight, target.weight(model))
    assert torch.equal(part.bias, target.bias(model))
    assert fitting.errors[f"{name(0)}.q"] == 0.0


def test_a_moved_matrix_is_fitted_to_what_it_is_given(start, gaussian):
    _model, _, _, shelf, fitting = start("llama", "svd-llm", cascade="anchored", keep_targets=0.5)
    unit = fitting.units[0]
    wanted = gaussian(*unit.shape)
    x = gaussian(100, unit.shape[1], seed=1) * torch.linspace(0.1, 3, unit.shape[1])
    moment = x.T @ x / 100
    moved = Moved(wanted, {"moment": moment, "mean": x.mean(0), "magnitude": x.abs().mean(0)}, None)
    fitted = fitting.fit(unit, moved)
    rank = fitting.entries[unit.name]["options"]["rank"]
    values, vectors = torch.linalg.eigh(moment + 1e-6 * moment.diagonal().mean() * torch.eye(32))
    root = vectors * values.sqrt() @ vectors.T
    singular = torch.linalg.svdvals(wanted @ root)
    expected = float((singular[rank:].square().sum() / singular.square().sum()).sqrt())
    assert fitting.errors[unit.name] == pytest.approx(expected, rel=1e-4)
    made = shelf.take(unit.name)
    assert torch.equal(made.weight, fitted.weight)
    assert fitted.bias is None
    error = float(((wanted - fitted.weight) @ root).norm() / (wanted @ root).norm())
    assert error == pytest.approx(expected, rel=1e-4)


def test_an_added_bias_gives_the_output_that_is_wanted(start, gaussian):
    _model, _, _, _, fitting = start("llama", "afm", cascade="anchored", keep_targets=0.5)
    unit = fitting.units[0]
    x, output = gaussian(100, 32, seed=1) + 1.0, gaussian(unit.shape[0], seed=2)
    statistics = {"moment": x.T @ x / 100, "mean": x.mean(0), "magnitude": x.abs().mean(0)}
    fitted = fitting.fit(unit, Moved(gaussian(*unit.shape), statistics, output))
    mean = fitted.weight.double() @ x.mean(0) + fitted.bias
    torch.testing.assert_close(mean, output, rtol=1e-4, atol=1e-4)
    assert fitting.entries[unit.name]["bias_added"]


def test_members_of_a_stack_are_cut_apart(start):
    model, _, _plan, shelf, fitting = start("llama", "basis-sharing", targets=["q_proj"])
    [unit] = fitting.units
    fitting.fit(unit)
    first, second = (shelf.take(member.name) for member in unit.members)
    assert torch.equal(first.right.weight, second.right.weight)
    name = "model.layers.{}.self_attn.q_proj.right.weight".format
    assert fitting.ties == {name(1): name(0)}
    whole, weight = torch.cat([first.weight, second.weight]), unit.weight(model)
    metric = fitting._job.evidence.metric(unit)
    assert fitting.errors[unit.name] == pytest.approx(metric.relative(weight, whole), rel=1e-4)
    entries = [fitting.entries[member.name] for member in unit.members]
    assert entries[0] == entries[1]
    assert (entries[0]["shape"], entries[0]["shared"]) == ([32, 32], True)


def test_the_error_of_a_pair_is_that_of_its_reader(start):
    model, _, _plan, shelf, fitting = start("gpt2", "modegpt", targets=r".*\.mlp\..*")
    for unit in fitting.units:
        fitting.fit(unit)
        rows = shelf.take(unit.producers[0].name).weight
        reader = shelf.take(unit.consumer.name).weight.detach()
        all_rows = unit.producers[0].weight(model)
        kept = torch.cat([(all_rows == row).all(1).nonzero().flatten() for row in rows])
        rebuilt = torch.zeros(unit.shape)
        rebuilt[kept] = reader.T
        expected = fitting._job.evidence.metric(unit).relative(unit.weight(model), rebuilt)
        assert fitting.errors[unit.name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scheme", ["svd", "modegpt"])
def test_a_block_is_taken_off_the_shelf_and_put_back(scheme, start):
    _model, job, _, _shelf, fitting = start("gpt2", scheme)
    for unit in fitting.units:
        fitting.fit(unit)
    taken = fitting.take("transformer.h.1")
    groups = {g[0].module: g for g in by_module(job.selection.targets)}
    assert taken.keys() == {name for name in groups if name.startswith("transformer.h.1.")}
    assert isinstance(taken["transformer.h.1.attn.c_attn"], FusedLinear)
    for module in taken.values():
        assert not any(p.is_meta for p in module.parameters())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 1.0
    values = {
        f"{name}.{key}": value.clone()
        for name, module in taken.items()
        for key, value in module.state_dict().items()
    }
    norm = nn.LayerNorm(32)
    fitting.keep("transformer.h.1", {**taken, "transformer.h.1.ln_1": norm})
    assert fitting.norms == {"transformer.h.1.ln_1": norm}
    again = fitting.take("transformer.h.1")
    for name, module in again.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, values[f"{name}.{key}"])


def test_blocks_with_like_names_are_told_apart(start, tiny_llama, monkeypatch):
    model = tiny_llama(num_hidden_layers=11)
    job = prepare(model, make_request("svd"), ["up_proj"], None, NO_DATA, False)
    plan = settle(model, job, predict=False, progress=False)
    shelf = Shelf()
    fitting = Fitting(model, job, plan, shelf)
    for unit in fitting.units:
        fitting.fit(unit)
    assert list(fitting.take("model.layers.1")) == ["model.layers.1.mlp.up_proj"]


def test_targets_of_one_module_go_together(make_model):
    targets = select(make_model("gpt2")).targets
    sizes = [len(group) for group in by_module(targets)]
    assert sizes == [3, 1, 1, 1] * 2
    assert [t for group in by_module(targets) for t in group] == targets


def test_a_plan_decides_the_order_and_the_specs(start):
    def change(layer):
        return dataclasses.replace(layer, spec={"rank": 3, "gauge": False})

    _, _, plan, shelf, fitting = start("llama", "svd", change)
    for unit in fitting.units:
        fitting.fit(unit)
    for layer in plan.layers:
        made = shelf.take(layer.name)
        assert isinstance(made, FactorizedLinear)
        assert made.right.weight.shape[0] == 3


def test_a_report_names_what_the_plan_named(make_model):
    model = tnlm.compress(make_model("gpt2"), "basis-sharing", calibration=IDS, max_length=32)
    errors = [layer.error for layer in tnlm.report(model).plan.layers]
    assert all(0 < error < 1 for error in errors)
