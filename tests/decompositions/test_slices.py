"""Matrices of one shape as the slices of one tensor."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.slices import Slices, macs_of_one, whole
from tnlm.decompositions.stack_tucker import FORMAT
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.metrics.several import Several

COUNT, SHAPE = 3, (6, 5)
FORMAT_OF_THREE = Slices(FORMAT, COUNT)
FIXED = {"slices": COUNT, "stack": COUNT}
seeds = st.integers(0, 20)


def drawn(gaussian, seed):
    """Return three matrices, and a metric of each."""
    samples = [gaussian(9, SHAPE[1], seed=seed + 10 * k) for k in range(COUNT)]
    parts = [lambda x=x: InputMoment(x.T @ x) for x in samples]
    return gaussian(COUNT, *SHAPE, seed=seed), Several(parts, [1.0, 2.0, 0.5])


@given(seed=seeds, keep=st.floats(0.4, 0.9))
def test_errors_are_those_of_what_the_factors_stand_for(seed, keep, gaussian):
    stack, several = drawn(gaussian, seed)
    found = FORMAT_OF_THREE.candidates(SHAPE, FIXED, Ceiling(keep * 30))
    for spec, predicted in zip(found, FORMAT_OF_THREE.errors(stack, several, found), strict=True):
        network = FORMAT_OF_THREE.network(SHAPE, spec)
        assert network.params <= keep * 30 * COUNT
        factors = FORMAT_OF_THREE.fit(stack, several, spec)
        rebuilt = FORMAT.reconstruct((COUNT * 6, 5), spec, factors).reshape(stack.shape)
        # A fit sweeps more often than a prediction.
        assert several.relative(stack, rebuilt) <= predicted * (1 + 1e-9) + 1e-9


@given(seed=seeds)
def test_a_curve_is_within_the_multiply_adds(seed, gaussian):
    stack, several = drawn(gaussian, seed)
    found = FORMAT_OF_THREE.curve(stack, several, FIXED, COUNT * 30)
    assert found
    assert all(error >= 0 for _, error in found)
    assert all(macs_of_one(FORMAT_OF_THREE.network(SHAPE, spec)) <= 30 for spec, _ in found)


@pytest.mark.parametrize("tolerance", [0.2, 0.6])
def test_what_is_within_a_tolerance_is_and_may_be_too_large(tolerance, gaussian):
    stack, several = drawn(gaussian, 0)
    (spec, *_) = FORMAT_OF_THREE.within(stack, several, FIXED, tolerance)
    assert FORMAT_OF_THREE.errors(stack, several, [spec])[0] <= tolerance
    network = FORMAT_OF_THREE.network(SHAPE, spec)
    own, work = network.params / COUNT, macs_of_one(network)
    assert FORMAT_OF_THREE.allows(SHAPE, spec, Ceiling(own, work))
    assert not FORMAT_OF_THREE.allows(SHAPE, spec, Ceiling(own - 1, work))
    assert not FORMAT_OF_THREE.allows(SHAPE, spec, Ceiling(own, work - 1))


def test_without_data_all_errors_count_the_same(gaussian):
    stack = gaussian(COUNT, *SHAPE)
    tall, metric = whole(stack, Metric())
    assert metric.norm(tall) == pytest.approx(float(stack.norm()))
