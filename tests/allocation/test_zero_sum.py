from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tnlm
from tests import mixtures
from tnlm.allocation.zero_sum import drop
from tnlm.calibration.data import token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.errors import BudgetError, OptionError
from tnlm.metrics.named.sloped import Sloped

UP = "model.layers.1.mlp.up_proj"
IDS = torch.arange(256) * 7 % 61 + 3
DATA = {"calibration": IDS, "max_length": 32, "progress": False}
lists = st.lists(
    st.lists(st.floats(-1, 1).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=6),
    min_size=1,
    max_size=5,
)


def by_hand(changes, prices, most):
    """Drop as the paper says, looking at every matrix again each time."""
    kept, total = [len(own) for own in changes], 0.0
    while sum(own[count] for own, count in zip(prices, kept, strict=True)) > most:
        tails = {m: own[kept[m] - 1] for m, own in enumerate(changes) if kept[m] > 1}
        wanted = {m: c for m, c in tails.items() if (c > 0) == (total <= 0)} or tails
        matrix = min(wanted, key=lambda m: (abs(wanted[m]), m))
        total += changes[matrix][kept[matrix] - 1]
        kept[matrix] -= 1
    return kept


@given(lists, st.floats(0.3, 1))
def test_components_leave_by_the_published_rule(changes, keep):
    prices = [[10 * count for count in range(len(own) + 1)] for own in changes]
    least = 10 * len(changes)
    most = max(least, int(keep * sum(own[-1] for own in prices)))
    assert drop(changes, prices, most) == by_hand(changes, prices, most)


def test_the_sum_stays_within_the_largest_change_while_both_signs_are_left():
    generator = torch.Generator().manual_seed(0)
    changes = torch.randn(20, 30, generator=generator).tolist()
    kept = drop(changes, [list(range(31))] * 20, most=400)
    gone = [own[count:] for own, count in zip(changes, kept, strict=True)]
    assert sum(map(len, gone)) == 200
    assert abs(sum(map(sum, gone))) <= max(abs(c) for own in gone for c in own)


def test_a_budget_below_one_component_each_is_refused():
    with pytest.raises(BudgetError, match="one component of each matrix has 20 parameters"):
        drop([[1.0, 1.0]] * 2, [[0, 10, 20]] * 2, most=19)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_changes_are_the_slope_times_what_is_dropped(gaussian, shape):
    weight, slope = gaussian(*shape, seed=1), gaussian(*shape, seed=2)
    root = gaussian(shape[1], 2 * shape[1], seed=3)
    metric = Sloped(root @ root.T, slope, damping=0.0)
    found = metric.changes(weight)
    assert float(found.sum()) == pytest.approx(-float((slope.double() * weight.double()).sum()))
    for rank in range(1, min(shape)):
        left, right = metric.low_rank(weight, rank)
        lost = left @ right - weight.double()
        assert float(found[rank:].sum()) == pytest.approx(float((slope.double() * lost).sum()))


def test_changes_are_sigma_times_the_derivative_in_whitened_coordinates(gaussian):
    weight, slope = gaussian(5, 7, seed=1), gaussian(5, 7, seed=2)
    metric = Sloped(torch.eye(7), slope, damping=0.0)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    wanted = -values * (left.T @ slope.double() @ right.T).diagonal()
    torch.testing.assert_close(metric.changes(weight), wanted)


def test_the_slope_is_the_gradient_of_the_mean_loss(make_model):
    model, batches = make_model("llama"), token_batches(IDS, max_length=32, batch_size=2)
    store = collect_gradients(
        model, [UP], batches, moment="none", slope=True, labels="data", progress=False
    )
    weight = model.get_submodule(UP).weight.requires_grad_(True)
    losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    rows = sum(len(batch["input_ids"]) for batch in batches)
    wanted = torch.autograd.grad(sum(losses) / len(losses), weight)[0] * 31 / 32
    assert rows == 8
    torch.testing.assert_close(store.tensor(UP, "slope").to(wanted), wanted, rtol=1e-3, atol=1e-7)


def test_the_scheme_meets_its_budget_and_leaves_some_matrices_dense(make_model):
    plan = tnlm.plan(make_model("llama"), "zs-svd", keep_targets=0.7, **DATA)
    assert 0.67 < plan.targets_after.params / plan.targets_before.params <= 0.7
    ranks = {layer.spec.get("rank") for layer in plan.layers}
    assert len(ranks) > 2


def test_another_metric_is_refused(make_model):
    with pytest.raises(OptionError, match="allowed: sloped-input"):
        tnlm.plan(make_model("llama"), "svd-llm", allocation="zero-sum", **DATA)


@pytest.mark.parametrize("option", [{"rank": 4}, {"rank": 4, "keep_targets": 0.7}])
def test_a_rank_is_not_taken(make_model, option):
    with pytest.raises(OptionError, match="rank= with allocation='zero-sum', which chooses it"):
        tnlm.plan(make_model("llama"), "zs-svd", **option, **DATA)


def test_multiply_adds_limit_the_ranks(make_model):
    plan = tnlm.plan(make_model("llama"), "zs-svd", max_macs=0.5, **DATA)
    assert all(layer.after.macs <= 0.5 * layer.before.macs for layer in plan.layers)


def test_a_matrix_without_a_rank_within_the_limit_is_named(make_model):
    with pytest.raises(BudgetError, match=r"no rank needs at most max_macs=0\.001"):
        tnlm.plan(make_model("llama"), "zs-svd", max_macs=0.001, **DATA)


def test_experts_share_a_rank():
    model = mixtures.make("Mixtral")
    plan = tnlm.plan(model, "zs-svd", keep_targets=0.6, **DATA)
    assert 0.5 < plan.targets_after.params / plan.targets_before.params <= 0.6
    assert any("experts" in layer.name and layer.format for layer in plan.layers)
