from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlm.decompositions.als import als
from tnlm.decompositions.base import Ceiling, as_tensor
from tnlm.decompositions.hooi import unfold
from tnlm.decompositions.stack_tucker import FORMAT, StackTuckerSpec
from tnlm.decompositions.tucker import realisable
from tnlm.decompositions.whitening import rebuild, whiten
from tnlm.errors import RankError
from tnlm.layers.linear import FactorizedLinear
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.metrics.stacked import Stacked

SLICES, HEIGHT, WIDTH = 4, 5, 6
SHAPE, DIMS = (SLICES * HEIGHT, WIDTH), (SLICES, HEIGHT, WIDTH)
FIXED = {"slices": SLICES, "stack": SLICES, "gauge": False}
seeds = st.integers(0, 20)
ranks = st.tuples(*(st.integers(1, size) for size in DIMS)).map(lambda r: realisable(DIMS, r))
close = {"rtol": 1e-8, "atol": 1e-8}


def spec_of(found, slices=SLICES, gauge=False):
    return StackTuckerSpec(tuple(found), slices, SLICES, gauge)


def moment(gaussian, size, seed):
    x = gaussian(3 * size, size, seed=seed)
    return x.T @ x / len(x)


def shared(gaussian, seed):
    """Return one metric for all slices."""
    one = Metric(Side(moment(gaussian, HEIGHT, seed)), Side(moment(gaussian, WIDTH, seed + 1)))
    return Stacked([one] * SLICES, [HEIGHT] * SLICES)


def apart(gaussian, seed):
    """Return a metric of its own for every slice."""
    members = [
        Metric(
            Side(moment(gaussian, HEIGHT, seed + k)), Side(moment(gaussian, WIDTH, seed + 50 + k))
        )
        for k in range(SLICES)
    ]
    return Stacked(members, [HEIGHT] * SLICES)


def fitted_error(weight, metric, spec):
    factors = FORMAT.fit(weight, metric, spec)
    return metric.relative(weight, FORMAT.reconstruct(SHAPE, spec, factors))


@given(seed=seeds)
@pytest.mark.parametrize("make", [shared, apart, lambda gaussian, seed: Metric()])
def test_full_ranks_are_exact(make, seed, gaussian):
    weight, spec = gaussian(*SHAPE, seed=seed), spec_of(DIMS)
    factors = FORMAT.fit(weight, make(gaussian, seed), spec)
    torch.testing.assert_close(FORMAT.reconstruct(SHAPE, spec, factors), weight, **close)
    assert FORMAT.errors(weight, make(gaussian, seed), [spec])[0] < 1e-7


@given(seed=seeds, found=ranks)
def test_a_stack_of_these_ranks_is_found_again(seed, found, gaussian):
    spec = spec_of(found)
    network = FORMAT.network(SHAPE, spec)
    shapes = {name: network.shape_of(name) for name in network.factors}
    made = {
        name: gaussian(math.prod(shape), 1, seed=seed + k).reshape(shape)
        for k, (name, shape) in enumerate(shapes.items())
    }
    weight = FORMAT.reconstruct(SHAPE, spec, made)
    for metric in (Metric(), shared(gaussian, seed), apart(gaussian, seed)):
        assert fitted_error(weight, metric, spec) < 1e-6


@given(seed=seeds, found=ranks)
def test_with_one_metric_for_all_the_error_is_within_the_hosvd_bound(seed, found, gaussian):
    weight, metric, spec = gaussian(*SHAPE, seed=seed), shared(gaussian, seed), spec_of(found)
    whitened = whiten(as_tensor(weight, DIMS), metric.modes(DIMS[:2], DIMS[2:]))
    tails = [
        float(torch.linalg.svdvals(unfold(whitened, mode))[rank:].square().sum())
        for mode, rank in enumerate(spec.ranks)
    ]
    size = metric.norm(weight) ** 2
    [reported] = FORMAT.errors(weight, metric, [spec])
    # Nothing is below the largest tail, so that the HOSVD is within sqrt(3) of the best.
    assert reported**2 * size <= sum(tails) * (1 + 1e-6) + 1e-9
    assert fitted_error(weight, metric, spec) <= reported + 1e-7
    assert fitted_error(weight, metric, spec) ** 2 * size >= max(tails) * (1 - 1e-6) - 1e-9


@settings(max_examples=12)  # an example is a whole fit
@given(seed=seeds, found=ranks)
def test_least_squares_never_raise_the_true_error(seed, found, gaussian):
    weight, metric, spec = gaussian(*SHAPE, seed=seed), apart(gaussian, seed), spec_of(found)
    network = FORMAT.network(SHAPE, spec)
    start = FORMAT.fit(weight, metric.start(), spec)
    fit = als(network, weight, metric, start, sweeps=4, stall=0.0)
    assert all(b <= a * (1 + 1e-9) for a, b in zip(fit.objective, fit.objective[1:], strict=False))
    left = metric.norm(weight - rebuild(network, fit.factors)) ** 2
    assert left == pytest.approx(fit.objective[-1], rel=1e-6, abs=1e-9)
    assert fitted_error(weight, metric, spec) <= FORMAT.errors(weight, metric, [spec])[0] + 1e-7


@given(seed=seeds, found=ranks, cut=st.integers(1, SLICES - 1))
def test_members_of_a_stack_compute_what_its_slices_do(seed, found, cut, gaussian):
    weight, spec = gaussian(*SHAPE, seed=seed), spec_of(found)
    network = FORMAT.network(SHAPE, spec)
    factors = FORMAT.fit(weight, Metric(), spec)
    dense = FORMAT.reconstruct(SHAPE, spec, factors)
    x = gaussian(3, WIDTH, seed=seed)
    for first, count in ((0, cut), (cut, SLICES - cut)):
        own = FORMAT.network((count * HEIGHT, WIDTH), spec_of(found, count))
        cut_out = {
            name: tensor.narrow(modes.index("a"), first, count) if "a" in modes else tensor
            for (name, modes), tensor in zip(network.factors.items(), factors.values(), strict=True)
        }
        layer = FactorizedLinear(own, bias=False, dtype=torch.float64).store(cut_out)
        rows = dense[first * HEIGHT : (first + count) * HEIGHT]
        torch.testing.assert_close(layer(x), x @ rows.T, **close)
        torch.testing.assert_close(layer.to_dense(), rows, **close)


@settings(max_examples=10)  # an example is a whole curve
@given(seed=seeds)
@pytest.mark.parametrize("make", [shared, apart])
def test_a_curve_falls_as_sizes_grow(make, seed, gaussian):
    weight, metric = gaussian(*SHAPE, seed=seed), make(gaussian, seed)
    curve = FORMAT.curve(weight, metric, FIXED, math.inf)
    sizes = [FORMAT.network(SHAPE, spec).params for spec, _ in curve]
    assert sizes == sorted(sizes)
    assert curve[-1][0].ranks == DIMS
    assert curve[-1][1] < 1e-7
    assert FORMAT.errors(weight, metric, [spec for spec, _ in curve]) == [e for _, e in curve]
    if make is shared:
        errors = [error for _, error in curve]
        assert errors == sorted(errors, reverse=True)


@given(keep=st.floats(0.02, 1.2), speed=st.floats(0.1, 3))
def test_candidates_are_within_their_budget(keep, speed):
    ceiling = Ceiling(keep * math.prod(SHAPE), speed * math.prod(SHAPE))
    for spec in FORMAT.candidates(SHAPE, FIXED, ceiling):
        assert ceiling.allows(FORMAT.network(SHAPE, spec))
        assert (spec.slices, spec.stack) == (SLICES, SLICES)


@given(seed=seeds, tolerance=st.sampled_from([1e-9, 0.1, 0.4, 0.9]))
def test_a_tolerance_is_met(seed, tolerance, gaussian):
    weight = gaussian(*SHAPE, seed=seed)
    for metric in (Metric(), shared(gaussian, seed), apart(gaussian, seed)):
        found = FORMAT.within(weight, metric, FIXED, tolerance)
        assert len(found) == 1
        assert fitted_error(weight, metric, found[0]) <= tolerance + 1e-7


def test_ranks_given_are_taken_as_they_are(gaussian):
    options = {**FIXED, "ranks": (2, 3, 4)}
    assert FORMAT.candidates(SHAPE, options, Ceiling()) == [spec_of((2, 3, 4))]
    assert FORMAT.candidates(SHAPE, options, Ceiling(params=20)) == []
    weight = gaussian(*SHAPE)
    [(spec, error)] = FORMAT.curve(weight, Metric(), options, math.inf)
    assert spec == spec_of((2, 3, 4))
    assert FORMAT.within(weight, Metric(), options, error + 1e-9) == [spec]
    assert FORMAT.within(weight, Metric(), options, error / 2) == []


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (spec_of((5, 5, 6)), "ranks"),
        (spec_of((1, 3, 2)), "ranks"),
        (spec_of((2, 2)), "ranks"),
        (StackTuckerSpec((2, 2, 2), 3, 4), "slices"),
        (StackTuckerSpec((2, 2, 2), 5, 4), "slices"),
    ],
)
def test_specs_that_the_stack_cannot_have_are_refused(spec, why):
    with pytest.raises(RankError, match=why):
        FORMAT.network(SHAPE, spec)
