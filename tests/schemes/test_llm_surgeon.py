"""LLM Surgeon on tiny models: one threshold, several shots, and what is saved."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import tnlm
from tests import mixtures
from tnlm.calibration.data import token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.statistics import collect
from tnlm.decompositions.surgery import remaining
from tnlm.errors import BudgetError, OptionError
from tnlm.metrics.sides import Side
from tnlm.recovery.pruning.surgeon import operate, threshold
from tnlm.targets.selection import select

IDS = torch.arange(256) * 7 % 61 + 3
DATA = {"calibration": IDS, "max_length": 32, "progress": False}


@pytest.fixture
def examined(make_model):
    """A model with its targets, and statistics that every shot is given."""
    model = make_model("llama")
    targets = select(model, "all-linear").targets
    batches = token_batches(IDS, max_length=32, batch_size=2)
    names = [target.module for target in targets]
    inputs = collect(model, names, batches, progress=False)
    gradients = collect_gradients(model, names, batches, progress=False)

    def sides(target, rows, columns):
        outputs = Side(gradients.tensor(target.module, "gradient"), 0.01).values[rows][:, rows]
        moment = Side(inputs.tensor(target.module, "moment"), 0.01).values[columns][:, columns]
        return outputs, moment

    return model, targets, sides


def test_one_shot_is_one_threshold_over_all_matrices(examined):
    model, targets, sides = examined
    changed = copy.deepcopy(model)
    found = operate(changed, targets, 0.7, 1, lambda shot: sides)
    total = sum(target.params for target in targets)
    left = sum(len(kept.rows) * len(kept.columns) for kept in found.values())
    assert 0.65 * total < left <= 0.7 * total
    for target in targets:
        kept, weight = found[target.name], target.weight(model).double()
        both = sides(target, *(torch.arange(size) for size in target.shape))
        wanted = remaining(weight, *both, kept.rows, kept.columns)
        after = target.weight(changed)
        torch.testing.assert_close(kept.core(after).double(), wanted, rtol=1e-4, atol=1e-6)
        assert int((after.abs().sum(1) > 0).sum()) <= len(kept.rows)


def test_shots_under_the_same_statistics_update_as_one_step_would(examined):
    """Projections onto nested spaces: only what is chosen depends on the shots."""
    model, targets, sides = examined
    changed = copy.deepcopy(model)
    found = operate(changed, targets, 0.6, 4, lambda shot: sides)
    for target in targets:
        kept = found[target.name]
        both = sides(target, *(torch.arange(size) for size in target.shape))
        wanted = remaining(target.weight(model).double(), *both, kept.rows, kept.columns)
        after = kept.core(target.weight(changed)).double()
        torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-5)


def test_sizes_fall_linearly(examined):
    model, targets, sides = examined
    seen, changed = [], copy.deepcopy(model)

    def examine(shot):
        seen.append(sum(int((t.weight(changed) != 0).sum()) for t in targets))
        return sides

    operate(changed, targets, 0.4, 3, examine)
    total = sum(target.params for target in targets)
    assert [round(count / total, 1) for count in seen] == [1.0, 0.8, 0.6]


def test_a_threshold_leaves_as_much_as_is_allowed():
    rows, columns = torch.tensor([1.0, 5.0, 9.0]), torch.tensor([2.0, 6.0])
    pair = [(rows, columns)]
    assert threshold(pair, most=6) == float("-inf")
    assert threshold(pair, most=4) == 1.0
    assert threshold(pair, most=2) == 2.0
    assert threshold(pair, most=1) == 5.0
    with pytest.raises(BudgetError, match="raise keep_targets="):
        threshold(pair, most=0)


def test_equal_matrices_with_equal_statistics_are_cut_alike(gaussian):
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.5, 3.5, 4.5])
    assert threshold([losses, losses], most=18) == 1.5


def test_one_shot_needs_no_second_look_at_the_model(make_model, monkeypatch):
    from tnlm.compression.gatherers import surgery

    monkeypatch.setattr(surgery, "_again", lambda *_: pytest.fail("measured again"))
    tnlm.plan(make_model("llama"), "llm-surgeon", shots=1, keep_targets=0.7, **DATA)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        tnlm.plan(make_model("llama"), "llm-surgeon", shots=2, keep_targets=0.7, **DATA)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_plan_says_what_compress_does_and_what_is_saved_is_loaded(kind, make_model, tmp_path):
    options = {"keep_targets": 0.7, "shots": 2, **DATA}
    plan = tnlm.plan(make_model(kind), "llm-surgeon", **options)
    model = tnlm.compress(make_model(kind), "llm-surgeon", **options)
    done = tnlm.report(model).plan
    assert [layer.spec for layer in done.layers] == [layer.spec for layer in plan.layers]
    assert done.targets_after == plan.targets_after
    assert done.targets_after.params <= 0.7 * done.targets_before.params
    assert any(layer.error for layer in done.layers)
    loaded = tnlm.load(tnlm.save(model, tmp_path / "saved"))
    ids = IDS[None, :9]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    dense = tnlm.to_dense(loaded)
    torch.testing.assert_close(dense(ids).logits, model(ids).logits)


def test_a_plan_is_carried_out_with_its_own_size_and_shots(make_model):
    options = {"keep_targets": 0.6, "shots": 2}
    plan = tnlm.Plan.from_json(
        tnlm.plan(make_model("llama"), "llm-surgeon", **options, **DATA).to_json()
    )
    model = tnlm.compress(make_model("llama"), plan, **DATA)
    direct = tnlm.compress(make_model("llama"), "llm-surgeon", **options, **DATA)
    assert torch.equal(model(IDS[None, :9]).logits, direct(IDS[None, :9]).logits)
    with pytest.raises(OptionError, match="which were chosen for all matrices together"):
        tnlm.compress(make_model("llama"), edited(plan), **DATA)


def edited(plan):
    """Return a plan with one row fewer."""
    first = next(layer for layer in plan.layers if layer.spec and layer.spec["rows"] > 1)
    spec = {**first.spec, "rows": first.spec["rows"] - 1}
    layers = [replace(each, spec=spec) if each == first else each for each in plan.layers]
    return replace(plan, layers=tuple(layers))


def test_what_remains_is_healed_and_what_was_removed_stays_removed(make_model):
    model = tnlm.compress(make_model("llama"), "llm-surgeon", keep_targets=0.6, shots=1, **DATA)
    before = {name: dense(model, name) for name in removed(model)}
    tnlm.heal(model, IDS.repeat(4), max_length=32, progress=False)
    assert before
    for name, weight in before.items():
        after = dense(model, name)
        assert not torch.equal(after, weight)
        assert torch.equal(after != 0, weight != 0)


@pytest.mark.parametrize("recover", ["lora", "correct"])
def test_adapters_recover_what_remains(recover, make_model):
    data = {"training": IDS.repeat(2), "recover_tokens": 128, **DATA}
    options = {"keep_targets": 0.6, "shots": 1}
    model = tnlm.compress(make_model("llama"), "llm-surgeon", **options, recover=recover, **data)
    plain = tnlm.compress(make_model("llama"), "llm-surgeon", **options, **DATA)
    assert removed(model) == removed(plain) != []
    for name in removed(model):
        assert torch.equal(dense(model, name) != 0, dense(plain, name) != 0)
    assert recover == "correct" or any(
        not torch.equal(dense(model, name), dense(plain, name)) for name in removed(model)
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_few_bits_store_what_remains_alone(kind, make_model, tmp_path):
    options = {"keep_targets": 0.6, "shots": 1, **DATA}
    plain = tnlm.compress(make_model(kind), "llm-surgeon", **options)
    model = tnlm.compress(make_model(kind), "llm-surgeon", precision="int8", **options)
    layers = tnlm.report(model).plan.layers
    assert removed(model) == removed(plain) != []
    modules = dict(model.named_modules())
    for layer in layers:
        held = sum(t.numel() * t.element_size() for t in modules[layer.name].state_dict().values())
        bias = modules[layer.name].bias
        assert held - (0 if bias is None else bias.numel() * 4) == layer.after.bytes, layer.name
    for name in removed(model):
        wanted = dense(plain, name)
        torch.testing.assert_close(dense(model, name), wanted, rtol=0.0, atol=0.05)
        assert not torch.equal(dense(model, name), wanted)
    ids = IDS[None, :9]
    loaded = tnlm.load(tnlm.save(model, tmp_path / "saved"))
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    torch.testing.assert_close(tnlm.to_dense(loaded)(ids).logits, model(ids).logits)


def removed(model):
    layers = tnlm.report(model).plan.layers
    return [layer.name for layer in layers if layer.format and min(layer.spec.values()) > 1]


def dense(model, name):
    return model.get_submodule(name).to_dense().detach()


def test_the_model_that_is_planned_for_stays_as_it_is(make_model):
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    tnlm.plan(model, "llm-surgeon", keep_targets=0.6, shots=2, **DATA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fraction_of_the_whole_model_is_kept(make_model):
    model = tnlm.compress(make_model("llama"), "llm-surgeon", keep=0.8, shots=1, **DATA)
    report = tnlm.report(model)
    assert 0.75 < report.parameters_after / report.parameters_before <= 0.8


def test_experts_that_are_one_parameter_are_left_alone():
    plan = tnlm.plan(mixtures.make("Mixtral"), "llm-surgeon", keep_targets=0.7, shots=1, **DATA)
    assert not any("experts" in layer.name for layer in plan.layers if layer.format)
    assert plan.targets_after.params <= 0.7 * plan.targets_before.params


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"rows": 3}, "unknown option 'rows'"),
        ({"shots": 0}, "shots=0; allowed: a whole number >= 1"),
        ({"max_macs": 0.5}, "max_macs=0.5 with allocation='surgery'"),
        ({"cascade": "anchored"}, "which has measured the changed model itself"),
        ({"metric": "two-sided"}, "allowed: surgery"),
        ({"allocation": "uniform"}, "metric='surgery' with allocation='uniform'"),
        ({"allocation": "loss"}, "metric='surgery' with allocation='loss'"),
    ],
)
def test_what_has_no_meaning_is_refused(option, text, make_model):
    with pytest.raises(OptionError, match=text):
        tnlm.plan(make_model("llama"), "llm-surgeon", **option, **DATA)


def test_it_is_refused_before_the_operation(make_model, monkeypatch):
    from tnlm.compression.gatherers import surgery

    monkeypatch.setattr(surgery, "operate", lambda *_: pytest.fail("operated"))
    for wrong in ({"max_macs": 0.9}, {"allocation": "uniform"}):
        with pytest.raises(OptionError):
            tnlm.plan(make_model("llama"), "llm-surgeon", **wrong, **DATA)
    with pytest.raises(OptionError, match=r"low-rank can be fitted only under .*two-sided"):
        tnlm.plan(make_model("llama"), "svd", metric="surgery", **DATA)


def test_shots_are_of_the_surgeon_alone(make_model):
    own = tnlm.scheme("llm-surgeon", metric="two-sided", allocation="uniform")
    with pytest.raises(OptionError, match="shots=3 has no effect with metric='two-sided'"):
        tnlm.plan(make_model("llama"), own, shots=3, **DATA)


def test_a_plan_with_other_data_names_the_layer_and_the_cause(make_model):
    plan = tnlm.plan(make_model("llama"), "llm-surgeon", keep_targets=0.6, shots=1, **DATA)
    other = {**DATA, "calibration": IDS[:96].flip(0)}
    with pytest.raises(OptionError, match=r"^model\.layers\.\d.*with the data that it was made"):
        tnlm.compress(make_model("llama"), plan, **other)


def test_a_budget_that_is_too_small_names_both_of_its_keywords(make_model):
    with pytest.raises(BudgetError, match="raise keep_targets= or keep="):
        tnlm.plan(make_model("llama"), "llm-surgeon", keep_targets=1e-5, shots=1, **DATA)


def test_without_the_surgeon_each_matrix_loses_its_own_least(make_model):
    own = tnlm.scheme("llm-surgeon", metric="two-sided", allocation="uniform")
    model = tnlm.compress(make_model("llama"), own, keep_targets=0.7, **DATA)
    kept = [layer.after.params / layer.before.params for layer in tnlm.report(model).plan.layers]
    assert 0.5 < min(kept) <= max(kept) <= 0.7
