from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.allocation.candidate import Candidate
from tnlm.allocation.loss import least_loss
from tnlm.errors import EvaluationError
from tnlm.studies.level_search.scaling import scaled, scales_of

LOSSES = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]


def curve_of(weight=1.0):
    return [Candidate((), price, weight * loss) for price, loss in enumerate(LOSSES, 1)]


def prices(curves, budget):
    return [chosen.price for chosen in least_loss(curves, budget)]


def start_of(curves, budget):
    chosen = least_loss(curves, budget)
    return tuple(curve.index(one) for curve, one in zip(curves, chosen, strict=True))


def true_divergence(truth):
    """Return a measure in which the units' losses are true ones, and add up."""
    return lambda state: sum(curve[index].loss for curve, index in zip(truth, state, strict=True))


def scales(curves, start, measure):
    return scales_of(curves, start, [f"unit{k}" for k in range(len(curves))], measure)


@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=5), st.floats(0.01, 100.0))
def test_predictions_that_are_right_up_to_one_factor_leave_the_plan_as_it_is(weights, factor):
    curves = [curve_of(weight) for weight in weights]
    budget = 3.5 * len(curves)
    start = start_of(curves, budget)
    found = scales(curves, start, true_divergence([curve_of(factor * w) for w in weights]))
    assert found == pytest.approx([factor] * len(curves), rel=1e-9)
    assert start_of(scaled(curves, [1.0] * len(curves)), budget) == start


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_a_unit_whose_loss_is_predicted_wrongly_gets_its_true_share(factor):
    predicted = [curve_of() for _ in range(4)]
    truth = [curve_of(factor), *predicted[1:]]
    budget = 14
    found = scales(predicted, start_of(predicted, budget), true_divergence(truth))
    assert found == pytest.approx([factor, 1.0, 1.0, 1.0])
    corrected = prices(scaled(predicted, found), budget)
    assert corrected == prices(truth, budget) != prices(predicted, budget)
    assert (corrected[0] > prices(predicted, budget)[0]) == (factor > 1)


def test_a_unit_that_stays_dense_is_measured_near_the_mean_loss():
    curves, seen = [curve_of(), curve_of(1000.0)], []

    def measure(state):
        seen.append(state)
        return 1.0

    scales(curves, (3, 5), measure)
    # Predicted 1.0 for the first; the least lossy level of the second, 500, is nearest to that.
    assert seen == [(3, 5), (5, 4)]


@pytest.mark.parametrize("value", [0.0, -1e-9, None])
def test_a_unit_without_a_finite_positive_divergence_gets_the_median(value, caplog):
    curves = [curve_of(), curve_of(), curve_of(), curve_of()]

    def measure(state):
        unit = next(k for k, index in enumerate(state) if index < 5)
        if unit != 2:
            return (1.0, 3.0, 0.0, 2.0)[unit]
        if value is None:
            raise EvaluationError("the divergence from the dense model is nan")
        return value

    with caplog.at_level(logging.WARNING, "tnlm"):
        assert scales(curves, (3, 3, 3, 3), measure) == [1.0, 3.0, 2.0, 2.0]
    assert "unit2: the scale" in caplog.text
    assert "unit1" not in caplog.text


def test_units_that_cannot_be_compressed_are_not_measured(caplog):
    dense = [Candidate((), 3, 0.0)]
    with caplog.at_level(logging.WARNING, "tnlm"):
        assert scales([dense, curve_of()], (0, 3), lambda _: 5.0) == [5.0, 5.0]
        assert scales([dense], (0,), lambda _: 5.0) == [1.0]
    assert not caplog.text
