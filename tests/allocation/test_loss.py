from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.allocation.curves import by_multiplier, curves
from tnlm.allocation.loss import ALLOCATION
from tnlm.errors import BudgetError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.plans.plan import total

UNITS = ("params", "bytes", "macs")
shapes = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3)


def spent(problem, found):
    return sum(problem.limits.price(layer.after) for layer in found)


def whole(problem, found):
    return sum(problem.limits.price(layer.before) for layer in found)


def harm(problem, found):
    weights = {t.name: t.weight(problem.model) for t in problem.targets}
    by_name = {t.name: t for t in problem.targets}
    return sum(
        ((layer.error or 0.0) * problem.metric(by_name[layer.name]).norm(weights[layer.name])) ** 2
        * problem.importance(by_name[layer.name])
        for layer in found
    )


@given(
    shapes=shapes,
    keep=st.floats(0.05, 1.0),
    unit=st.sampled_from(UNITS),
    seed=st.integers(0, 9),
    power=st.floats(-6, 6),
)
def test_near_to_exhaustive_search_and_within_the_budget(
    shapes, keep, unit, seed, power, make_problem
):
    effects = [10**power, 1.0, 10**-power][: len(shapes)]
    problem = make_problem(shapes, keep, effects=effects, seed=seed, unit=unit)
    found = curves(problem)
    dense = sum(curve[-1].price for curve in found)
    if sum(curve[0].price for curve in found) > keep * dense:
        with pytest.raises(BudgetError):
            ALLOCATION.allocate(problem)
        return
    chosen = ALLOCATION.allocate(problem)
    assert [layer.name for layer in chosen] == [target.name for target in problem.targets]
    assert spent(problem, chosen) <= keep * whole(problem, chosen) * (1 + 1e-12)
    every = [
        (sum(c.price for c in choice), sum(c.loss for c in choice))
        for choice in itertools.product(*found)
    ]
    best = min(loss for price, loss in every if price <= keep * dense * (1 + 1e-12))
    # Never worse than what the hull has just below the budget.
    floor = [c.loss for c in by_multiplier(found) if c.price <= keep * dense * (1 + 1e-12)]
    top = max(loss for _, loss in every)
    assert best - 1e-9 * top <= harm(problem, chosen) <= min(floor) + 1e-9 * top


@pytest.mark.parametrize("unit", UNITS)
def test_more_budget_is_never_more_harm(unit, make_problem):
    harms = []
    for keep in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        problem = make_problem([(12, 10), (8, 14), (9, 9)], keep, effects=[1, 30, 0.1], unit=unit)
        harms.append(harm(problem, ALLOCATION.allocate(problem)))
    assert harms == sorted(harms, reverse=True)
    assert harms[-1] == 0.0


def test_a_whole_budget_leaves_all_dense(make_problem, make_pairs):
    for problem in (make_problem([(12, 10), (8, 8)], 1.0), make_pairs(1.0, alike=(0,))):
        chosen = ALLOCATION.allocate(problem)
        assert all(layer.format is None for layer in chosen)
        assert len(chosen) == len(problem.targets)
        assert all(layer.note for layer in chosen)


def test_what_matters_most_stays_dense_and_what_does_not_is_cut_first(make_problem):
    problem = make_problem([(12, 12)] * 3, 0.6, effects=[1.0, 0.0, 1e9])
    first, nothing, most = ALLOCATION.allocate(problem)
    assert most.format is None
    assert nothing.spec["rank"] == 1
    assert first.after.params > nothing.after.params
    assert spent(problem, [first, nothing, most]) <= 0.6 * 3 * 144


def test_nothing_matters_everything_goes(make_problem):
    chosen = ALLOCATION.allocate(make_problem([(12, 10), (8, 8)], 0.5, effects=[0.0, 0.0]))
    assert [layer.spec["rank"] for layer in chosen] == [1, 1]


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_the_scale_of_the_metric_changes_nothing(scale, make_problem):
    even = Metric(inputs=Side(torch.full((10,), scale)))
    shapes = [(12, 10), (8, 10)]
    plain, weighed = (
        ALLOCATION.allocate(make_problem(shapes, 0.5, metric=metric)) for metric in (None, even)
    )
    assert [layer.spec for layer in plain] == [layer.spec for layer in weighed]


def test_harm_is_measured_in_the_metric(make_problem):
    # Only the inputs of the first matrix are large: it keeps more than without that.
    problem = make_problem([(12, 10)] * 2, 0.6)
    loud = {"m0": Metric(inputs=Side(torch.full((10,), 100.0))), "m1": Metric()}
    weighed = dataclasses.replace(problem, metric=lambda target: loud[target.name])
    plain, heard = (ALLOCATION.allocate(x)[0].after.params for x in (problem, weighed))
    assert heard > plain


@pytest.mark.parametrize("unit", UNITS)
def test_an_impossible_budget_names_the_smallest_which_works(unit, make_problem):
    problem = make_problem([(12, 10), (7, 9)], 0.02, unit=unit)
    with pytest.raises(BudgetError, match=f"0.02 of the targets' {unit} cannot be met") as caught:
        ALLOCATION.allocate(problem)
    smallest = float(re.search(r"allow is ([\d.]+)", str(caught.value))[1])
    limits = dataclasses.replace(problem.limits, keep=smallest)
    chosen = ALLOCATION.allocate(dataclasses.replace(problem, limits=limits))
    assert spent(problem, chosen) <= smallest * whole(problem, chosen)
    assert [layer.spec["rank"] for layer in chosen] == [1, 1]
    limits = dataclasses.replace(problem.limits, keep=smallest - 2e-4)
    with pytest.raises(BudgetError):
        ALLOCATION.allocate(dataclasses.replace(problem, limits=limits))


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("unit", ["params", "macs"])
def test_a_pair_loses_channels_where_they_agree(keep, unit, make_pairs):
    problem = make_pairs(keep, alike=(0,), unit=unit)
    chosen = ALLOCATION.allocate(problem)
    formats = {layer.name: layer.format for layer in chosen}
    assert formats["h.0.fc1+h.0.fc2"] == "channels"
    covered = [name for layer in chosen for name in layer.name.split("+")]
    assert covered == [target.name for target in problem.targets]
    assert spent(problem, chosen) <= keep * whole(problem, chosen)
    assert total(x.before for x in chosen).params == sum(t.params for t in problem.targets)


def test_several_formats_compete(make_problem):
    problem = make_problem([(12, 12)] * 2, 0.5, formats=("low-rank", "kronecker"))
    both = harm(problem, ALLOCATION.allocate(problem))
    for name in ("low-rank", "kronecker"):
        single = make_problem([(12, 12)] * 2, 0.5, formats=(name,))
        assert both <= harm(single, ALLOCATION.allocate(single)) + 1e-9


def test_a_bias_that_is_added_counts(make_problem):
    problem = make_problem([(12, 10), (9, 9)], 0.6)
    biased = dataclasses.replace(problem, adds_bias=True)
    chosen = ALLOCATION.allocate(biased)
    assert spent(biased, chosen) <= 0.6 * 201
    assert all(layer.bias == (layer.format is not None) for layer in chosen)
    for layer in chosen:
        if layer.format:
            rank, (m, n) = layer.spec["rank"], layer.shape
            assert layer.after.params == rank * (m + n - rank) + m
