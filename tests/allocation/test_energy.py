from __future__ import annotations

import dataclasses
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.allocation.curves import at_tolerance, by_tolerance, curves
from tnlm.allocation.energy import ALLOCATION
from tnlm.errors import BudgetError

shapes = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=3)


def spent(problem, found):
    return sum(problem.limits.price(layer.after) for layer in found)


@given(
    shapes=shapes,
    keep=st.floats(0.05, 1.0),
    unit=st.sampled_from(["params", "bytes", "macs"]),
    seed=st.integers(0, 9),
)
def test_the_smallest_common_error_within_the_budget(shapes, keep, unit, seed, make_problem):
    problem = make_problem(shapes, keep, seed=seed, unit=unit)
    found = curves(problem, attrgetter("error"), by_tolerance)
    dense = sum(curve[-1].price for curve in found)
    if sum(curve[0].price for curve in found) > keep * dense:
        with pytest.raises(BudgetError):
            ALLOCATION.allocate(problem)
        return
    chosen = ALLOCATION.allocate(problem)
    assert spent(problem, chosen) <= keep * dense * (1 + 1e-12)
    worst = max(layer.error or 0.0 for layer in chosen)
    for layer, curve in zip(chosen, found, strict=True):
        # Each is the cheapest that meets the common error.
        assert problem.limits.price(layer.after) == at_tolerance(curve, worst).price
    # With any smaller common error the budget is exceeded.
    levels = [c.error for curve in found for c in curve if c.error < worst * (1 - 1e-9)]
    if levels:
        finer = sum(at_tolerance(curve, max(levels)).price for curve in found)
        assert finer > keep * dense * (1 - 1e-12)


@pytest.mark.parametrize("effects", [[1.0, 1e6, 1e-6], [0.0, 1.0, 0.0], [0.0] * 3])
def test_the_effect_on_the_loss_does_not_count(effects, make_problem):
    sizes = [(12, 10), (8, 14), (9, 9)]
    plain, weighed = (
        ALLOCATION.allocate(make_problem(sizes, 0.5, effects=e)) for e in (None, effects)
    )
    assert plain == weighed


def test_equal_spectra_share_equally(make_problem):
    problem = make_problem([(12, 10)], 0.5)
    twice = make_problem([(12, 10), (12, 10)], 0.5)
    twice.model["m1"].weight.data = 1000 * twice.model["m0"].weight.data
    (alone,), both = ALLOCATION.allocate(problem), ALLOCATION.allocate(twice)
    assert [layer.spec for layer in both] == [alone.spec] * 2


def test_a_whole_budget_leaves_all_dense(make_problem, make_pairs):
    for problem in (make_problem([(12, 10), (8, 8)], 1.0), make_pairs(1.0, alike=(0,))):
        assert all(layer.format is None for layer in ALLOCATION.allocate(problem))


def test_a_matrix_of_zeros_is_free(make_problem):
    problem = make_problem([(12, 10), (12, 10)], 0.6)
    problem.model["m0"].weight.data.zero_()
    zero, other = ALLOCATION.allocate(problem)
    assert (zero.spec["rank"], zero.error) == (1, 0.0)
    assert other.format is None or other.error < 0.1


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_pairs_meet_the_common_error_as_well(keep, make_pairs):
    problem = make_pairs(keep, alike=(0,))
    chosen = ALLOCATION.allocate(problem)
    assert spent(problem, chosen) <= keep * sum(target.params for target in problem.targets)
    assert chosen[0].format == "channels"
    covered = [name for layer in chosen for name in layer.name.split("+")]
    assert covered == [target.name for target in problem.targets]
    # Taken apart, a pair's matrices have one tolerance, not one price.
    worst = max(layer.error or 0.0 for layer in chosen)
    apart = curves(dataclasses.replace(problem, joint=()), attrgetter("error"))
    found = {curve[0].layers[0].name: at_tolerance(curve, worst) for curve in apart}
    for layer in chosen:
        if "+" not in layer.name:
            assert layer.after.params == found[layer.name].price
