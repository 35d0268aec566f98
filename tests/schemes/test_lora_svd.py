"""The LoRA whose gradients weigh the columns is trained and stays as the compensation."""

from __future__ import annotations

import copy

import pytest
import torch

import tnlm
from tnlm.calibration import lora as gathering
from tnlm.decompositions import get_format
from tnlm.decompositions.low_rank import LowRankSpec
from tnlm.errors import OptionError
from tnlm.metrics.named.lora import KeptLora
from tnlm.metrics.sides import Side

pytest.importorskip("peft")
IDS = torch.arange(512) * 7 % 61 + 3
DATA = {"calibration": IDS, "max_length": 32, "num_samples": 8, "progress": False}
KEPT = {"metric": "lora-kept", "lora_steps": 6, "lora_rank": 2, "keep_targets": 0.8}


@pytest.fixture
def learned(monkeypatch):
    """What collect_lora returned last, at a rate at which a few steps show."""
    seen, collect = {}, gathering.collect_lora

    def noted(*arguments, **options):
        seen["options"] = options
        found = collect(*arguments, **options, learning_rate=0.05)
        seen["loras"] = found[1]
        return found

    monkeypatch.setattr(gathering, "collect_lora", noted)
    return seen


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("rank", [3, 5])
def test_the_rest_of_the_rank_is_the_best_fit_of_the_matrix_alone(shape, rank, gaussian):
    weight, weights = gaussian(*shape).double(), gaussian(shape[1], seed=3).abs()
    A, B = gaussian(2, shape[1], seed=1).double(), gaussian(shape[0], 2, seed=2).double()
    metric = KeptLora(Side(weights), A, B)
    left, right = metric.low_rank(weight + B @ A, rank)
    assert left.shape[1] == rank
    scaled = weight * weights.sqrt()
    u, s, vh = torch.linalg.svd(scaled, full_matrices=False)
    own = (u[:, : rank - 2] * s[: rank - 2]) @ vh[: rank - 2] / weights.sqrt()
    torch.testing.assert_close(left @ right, own + B @ A)
    spectrum = metric.spectrum(weight + B @ A)
    error = metric.norm(weight + B @ A - left @ right) ** 2
    assert float(spectrum[rank:].sum()) == pytest.approx(error)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("own", [1, 3, 6, 8])
def test_the_error_of_every_rank_is_predicted(shape, own, gaussian):
    weight, weights = gaussian(*shape).double(), gaussian(shape[1], seed=3).abs()
    A, B = gaussian(own, shape[1], seed=1), gaussian(shape[0], own, seed=2)
    metric, structure = KeptLora(Side(weights), A, B), get_format("low-rank")
    specs = [LowRankSpec(rank, gauge=False) for rank in range(1, 7)]
    found = []
    for spec in specs:
        left, right = metric.low_rank(weight, spec.rank)
        found.append(metric.relative(weight, left @ right))
    assert len(metric.spectrum(weight)) == 6
    assert structure.errors(weight, metric, specs) == pytest.approx(found, abs=1e-7)
    for tolerance in (1e-9, 0.3):
        (spec,) = structure.within(weight, metric, {}, tolerance)
        assert spec.rank == next(n + 1 for n, error in enumerate(found) if error <= tolerance)


@pytest.mark.parametrize("allocation", ["truncation", "energy"])
def test_other_allocations_take_its_spectrum(allocation, make_model):
    options = {**KEPT, "lora_steps": 1, "lora_rank": 8, "allocation": allocation}
    plan = tnlm.plan(make_model("llama"), "lora-svd", **options, **DATA)
    assert plan.targets_after.params <= 0.8 * plan.targets_before.params


def test_a_rank_that_has_no_room_for_the_lora_fits_the_sum(gaussian):
    weight, A, B = gaussian(5, 7), gaussian(3, 7, seed=1), gaussian(5, 3, seed=2)
    metric = KeptLora(Side(torch.ones(7)), A, B)
    left, right = metric.low_rank(weight, 2)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :2] * s[:2]) @ vh[:2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_learned_lora_stands_in_the_compressed_layers(kind, make_model, learned):
    dense, model = make_model(kind), make_model(kind)
    tnlm.compress(model, "lora-svd", **KEPT, **DATA)
    report = tnlm.report(model)
    assert report.plan.targets_after.params <= 0.8 * report.plan.targets_before.params
    name = {"llama": "model.layers.0.mlp.up_proj", "gpt2": "transformer.h.0.mlp.c_fc"}[kind]
    layer = next(each for each in report.plan.layers if each.name == name)
    weight = dense.get_submodule(name).weight.detach().double()
    delta = learned["loras"][name].delta()
    assert float(delta.norm()) > 1e-3 * float(weight.norm())
    rest = model.get_submodule(name).to_dense().detach().double() - delta
    values = torch.linalg.svdvals(rest)
    own = layer.spec["rank"] - 2
    assert float(values[own]) < 1e-4 * float(values[0]) < float(values[own - 1])
    assert learned["options"]["steps"] == 6


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_part_of_a_fused_module_holds_its_own_lora_alone(part, make_model, learned):
    dense, model = make_model("gpt2"), make_model("gpt2")
    tnlm.compress(model, "lora-svd", **KEPT, **DATA)
    module = "transformer.h.0.attn.c_attn"
    layer = next(x for x in tnlm.report(model).plan.layers if x.name == f"{module}.{part}")
    rows = slice(32 * "qkv".index(part), 32 * "qkv".index(part) + 32)
    delta = learned["loras"][module].delta()[rows]
    values = torch.linalg.svdvals(delta)
    assert float(values[2]) < 1e-6 * float(values[1])
    weight = dense.get_submodule(module).weight.detach().double().T[rows]
    assert float(delta.norm()) > 1e-3 * float(weight.norm())
    fitted = model.get_submodule(layer.name).to_dense().detach().double()
    values, own = torch.linalg.svdvals(fitted - delta), layer.spec["rank"] - 2
    assert float(values[own]) < 1e-4 * float(values[0]) < float(values[own - 1])


def test_a_plan_is_carried_out_with_its_own_lora(make_model, learned):
    plan = tnlm.plan(make_model("llama"), "lora-svd", **KEPT, lora_step=0.5, **DATA)
    wanted = {name: learned["options"][name] for name in ("rank", "steps", "step")}
    learned.clear()
    model = tnlm.compress(make_model("llama"), tnlm.Plan.from_json(plan.to_json()), **DATA)
    assert {name: learned["options"][name] for name in wanted} == wanted
    for planned, made in zip(plan.layers, tnlm.report(model).plan.layers, strict=True):
        assert made.error == pytest.approx(planned.error, abs=1e-5)


def test_the_model_that_is_given_is_changed_only_by_the_swap(make_model, learned):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    tnlm.plan(model, "lora-svd", **KEPT, **DATA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_options_of_the_lora_reach_it_and_the_report(make_model, learned):
    options = {"lora_rank": 3, "lora_steps": 2, "lora_step": 0.5}
    model = tnlm.compress(make_model("llama"), "lora-svd", **options, **DATA)
    assert {name: learned["options"][name] for name in ("rank", "steps", "step")} == {
        "rank": 3,
        "steps": 2,
        "step": 0.5,
    }
    assert {name: tnlm.report(model).data[name] for name in options} == options


@pytest.mark.parametrize(
    ("scheme", "options", "text"),
    [
        ("svd-llm", {"lora_rank": 4}, "lora_rank= has no effect with metric='input'"),
        ("lora-svd", {"lora_rank": 0}, "lora_rank=0; allowed: a whole number of at least 1"),
        ("lora-svd", {"lora_steps": -1}, "lora_steps=-1; allowed: a whole number of at least 0"),
        ("lora-svd", {"lora_step": float("nan")}, "lora_step=nan; allowed: a finite number"),
        ("lora-svd", {"lora_step": 0.5}, "lora_step= has no effect on a LoRA that is not trained"),
        ("lora-svd", {"lora_step": 0.5, "lora_steps": 0}, "give lora_steps= as well"),
        (
            "lora-svd",
            {"metric": "lora-kept", "lora_steps": 0},
            "lora_steps=0; allowed: a whole number of at least 1",
        ),
    ],
)
def test_options_of_no_lora_are_refused(scheme, options, text, make_model):
    with pytest.raises(OptionError, match=text):
        tnlm.plan(make_model("llama"), scheme, **options, **DATA)
