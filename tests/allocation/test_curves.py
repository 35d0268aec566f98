from __future__ import annotations

import dataclasses
import itertools
import math
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.allocation.curves import (
    Candidate,
    at_multiplier,
    at_tolerance,
    by_multiplier,
    by_tolerance,
    check_budget,
    curves,
    least_within,
    spend_rest,
)
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import BudgetError, RankError
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.tensors.network import Cost


def candidate(price, loss, error=None):
    cost = Cost(price, price, price)
    error = math.sqrt(loss) if error is None else error
    return Candidate((LayerPlan("m", "linear", (2, 2), None, {}, cost, cost, error),), price, loss)


@st.composite
def fronts(draw, most=6):
    """A curve of falling loss, ending with none."""
    count = draw(st.integers(1, most))
    prices = sorted(draw(st.sets(st.integers(1, 60), min_size=count, max_size=count)))
    losses = sorted(draw(st.sets(st.integers(1, 900), min_size=count - 1, max_size=count - 1)))
    return [
        candidate(p, float(loss)) for p, loss in zip(prices, [*reversed(losses), 0], strict=True)
    ]


def price_of(chosen):
    return sum(c.price for c in chosen)


def loss_of(chosen):
    return sum(c.loss for c in chosen)


@given(parts=st.lists(fronts(), min_size=1, max_size=3), power=st.floats(-4, 8))
def test_combinations_are_the_best_at_every_multiplier(parts, power):
    multiplier = math.exp(power)
    every = [price_of(c) * multiplier + loss_of(c) for c in itertools.product(*parts)]
    combined = by_multiplier(parts)
    best = at_multiplier(combined, multiplier)
    assert best.loss + multiplier * best.price == pytest.approx(min(every), rel=1e-12)
    assert combined[0].price == price_of(curve[0] for curve in parts)
    assert (combined[-1].loss, combined[-1].price) == (0, price_of(curve[-1] for curve in parts))
    assert all(a.price < b.price and a.loss > b.loss for a, b in itertools.pairwise(combined))
    assert all(len(c.layers) == len(parts) for c in combined)


@given(parts=st.lists(fronts(), min_size=1, max_size=3), bound=st.floats(0, 31))
def test_combinations_of_one_tolerance_are_the_cheapest_that_meet_it(parts, bound):
    combined = sorted(by_tolerance(parts), key=lambda c: c.price)
    met = [c for c in itertools.product(*parts) if all(part.error <= bound for part in c)]
    assert at_tolerance(combined, bound).price == min(map(price_of, met))


@given(curve=fronts(), low=st.floats(-5, 8), step=st.floats(0, 5))
def test_a_larger_multiplier_never_costs_more(curve, low, step):
    here, there = (at_multiplier(curve, math.exp(x)) for x in (low, low + step))
    assert there.price <= here.price
    assert at_multiplier(curve, math.inf) is curve[0]
    assert at_multiplier(curve, 0.0).loss == 0


problems = st.lists(fronts(5), min_size=1, max_size=3)


@given(found=problems, part=st.floats(0, 1))
def test_the_search_is_within_its_budget_and_best_for_what_it_spends(found, part):
    least, most = (sum(curve[k].price for curve in found) for k in (0, -1))
    budget = least + part * (most - least)
    top = max(curve[0].loss for curve in found) or 1.0
    chosen = least_within(found, budget, at_multiplier, 1e-30 * top, 2.0 * top)
    every = list(itertools.product(*found))
    # A Lagrangian choice is best among all that cost no more than it does.
    same = [loss_of(c) for c in every if price_of(c) <= price_of(chosen)]
    assert price_of(chosen) <= budget
    assert loss_of(chosen) == pytest.approx(min(same))
    spent = spend_rest(found, chosen, budget)
    assert price_of(spent) <= budget
    assert loss_of(spent) <= loss_of(chosen)
    best = min(loss_of(c) for c in every if price_of(c) <= budget)
    # The gap is bounded by the hull: what it would pay for the budget that is left.
    hull = by_multiplier(found)
    above = [(a, b) for a, b in itertools.pairwise(hull) if a.price <= budget < b.price]
    gap = sum((a.loss - b.loss) * (budget - a.price) / (b.price - a.price) for a, b in above)
    assert best <= loss_of(spent) <= best + gap + 1e-9
    for index, curve in enumerate(found):  # no single upgrade still fits
        for other in curve:
            change = other.price - spent[index].price
            assert other.loss >= spent[index].loss or price_of(spent) + change > budget


def test_what_is_left_buys_the_best_upgrade_first():
    found = [
        [candidate(1, 10.0), candidate(3, 4.0), candidate(4, 0.0)],
        [candidate(1, 9.0), candidate(2, 1.0), candidate(5, 0.0)],
    ]
    start = [curve[0] for curve in found]
    assert [c.price for c in spend_rest(found, start, 2)] == [1, 1]
    assert [c.price for c in spend_rest(found, start, 3)] == [1, 2]
    assert [c.price for c in spend_rest(found, start, 5)] == [3, 2]
    assert [c.price for c in spend_rest(found, start, 99)] == [4, 5]
    assert [c.price for c in start] == [1, 1]


@pytest.mark.parametrize("unit", ["params", "bytes", "macs"])
def test_curves_hold_what_the_formats_offer_at_its_price(unit, make_problem):
    problem = make_problem([(12, 10), (8, 8)], 0.5, effects=[2.0, 3.0], unit=unit)
    for curve, target, effect in zip(curves(problem), problem.targets, (2.0, 3.0), strict=True):
        weight = target.weight(problem.model)
        assert all(a.price < b.price and a.loss > b.loss for a, b in itertools.pairwise(curve))
        assert curve[-1].layers[0].format is None
        assert curve[-1].loss == curve[-1].error == 0.0
        for one in curve[:-1]:
            (layer,) = one.layers
            assert one.price == getattr(layer.after, unit)
            structure = get_format(layer.format)
            spec = from_dict(structure.spec, layer.spec)
            fitted = structure.fit(weight, Metric(), spec)
            error = weight - structure.reconstruct(target.shape, spec, fitted)
            assert one.loss == pytest.approx(effect * float(error.square().sum()), rel=1e-6)
            assert one.error == pytest.approx(float(error.norm() / weight.norm()), rel=1e-6)
            assert layer.after.params < layer.before.params
            assert layer.after.macs <= layer.before.macs


@pytest.mark.parametrize("speed", [0.3, 0.6, 1.0, math.inf])
def test_no_candidate_is_slower_than_allowed(speed, make_pairs):
    for curve in curves(make_pairs(0.5, max_macs=speed)):
        for one in curve:
            for layer in one.layers:
                assert layer.format is None or layer.after.macs <= speed * layer.before.macs


@pytest.mark.parametrize("harm", ["loss", "error"])
def test_a_matrix_without_effect_has_one_candidate_of_no_loss(harm, make_problem):
    problem = make_problem([(12, 10), (8, 8)], 0.5, effects=[0.0, 1.0])
    none, some = curves(problem, attrgetter(harm))
    assert none[-1].loss == 0.0
    assert some[-1].error == 0.0
    if harm == "loss":
        assert len(none) == 1
        assert none[0].layers[0].spec["rank"] == 1
    else:  # its error still counts where errors are compared
        assert none[-1].error == 0.0
        assert len(none) > 1


def test_options_that_a_matrix_cannot_have_name_it(make_problem):
    problem = make_problem([(12, 10), (8, 8)], 0.5, options={"rank": 9})
    with pytest.raises(
        RankError, match=r"m1: rank=9; .* allows 1 to 8; choose options that fit all targets"
    ):
        curves(problem)


@given(keep=st.integers(1, 100))
def test_a_budget_is_a_whole_number_without_rounding_down_wrongly(keep, make_problem):
    problem = make_problem([(10, 10)], keep / 100)
    cheap = [[candidate(1, 1.0), candidate(100, 0.0)]]
    assert check_budget(problem, cheap) == keep
    assert isinstance(check_budget(problem, cheap), int)


@given(least=st.integers(2, 120))
def test_the_smallest_budget_that_an_error_names_works(least, make_problem):
    found = [[candidate(least, 1.0), candidate(120, 0.0)]]
    with pytest.raises(BudgetError, match=r"0\.01 of the targets' params cannot be met") as caught:
        check_budget(make_problem([(12, 10)], 0.01), found)
    smallest = float(str(caught.value).rpartition(" ")[2])
    assert least <= check_budget(make_problem([(12, 10)], smallest), found) <= least + 1
    assert smallest <= least / 120 + 1e-4


@pytest.mark.parametrize("harm", ["loss", "error"])
def test_a_pair_has_one_curve_of_both_ways(harm, make_pairs):
    problem = make_pairs(0.5, alike=(0,))
    together = by_tolerance if harm == "error" else None
    found = curves(problem, attrgetter(harm), together)
    sizes = [{len(c.layers) for c in curve} for curve in found]
    # The first pair's channels agree: dropping them is better than most that low rank can do.
    assert sizes == [{1, 2}, sizes[1], {1}]
    for curve in found:
        assert all(layer.format is None for layer in curve[-1].layers)
        for one in curve:
            assert (one.layers[0].format == "channels") == ("+" in one.layers[0].name)
            assert one.price == sum(layer.after.params for layer in one.layers)


@pytest.mark.parametrize("alike", [(), (0,), (0, 1)])
def test_a_pair_is_best_at_every_multiplier(alike, make_pairs):
    problem = make_pairs(0.5, alike=alike)
    apart = curves(dataclasses.replace(problem, joint=()))
    alone = {curve[-1].layers[0].name: curve for curve in apart}
    found = {"+".join(x.name for x in curve[-1].layers): curve for curve in curves(problem)}
    assert found["head"] == alone["head"]
    for unit in problem.joint:
        weight, metric = unit.weight(problem.model), problem.metric(unit)
        channels = get_format("channels").curve(weight, metric, {}, math.inf)
        every = [
            (unit.params * spec.width // unit.shape[0], (error * metric.norm(weight)) ** 2)
            for spec, error in channels
        ]
        parts = [alone[member.name] for member in unit.members]
        every += [(price_of(c), loss_of(c)) for c in itertools.product(*parts)]
        for power in range(-12, 8):
            multiplier = 10.0 ** (power / 2)
            best = at_multiplier(found[unit.name], multiplier)
            assert best.loss + multiplier * best.price == pytest.approx(
                min(loss + multiplier * price for price, loss in every), rel=1e-9, abs=1e-9
            )
