from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions import tensor_ring, tensor_train
from tnlm.decompositions.als import als
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.tensor_ring import FORMAT, TensorRingSpec
from tnlm.decompositions.whitening import closed_form
from tnlm.errors import RankError
from tnlm.layers.linear import FactorizedLinear
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.gauge import fix

modes, seeds, parts = st.integers(1, 3), st.integers(0, 20), st.floats(0, 1)
splits = st.integers(3, 4).flatmap(
    lambda order: st.tuples(*[st.lists(modes, min_size=order, max_size=order).map(tuple)] * 2)
)


def spec_of(out, inp, part, closing):
    """Return a spec whose ranks are a part of what these splits allow."""
    pairs = [a * b for a, b in zip(out, inp, strict=True)]
    ranks = (closing, *[max(1, round(part * math.prod(pairs)))] * (len(pairs) - 1))
    return TensorRingSpec(out, inp, tensor_ring._capped(pairs, ranks))


def shape_of(spec):
    return math.prod(spec.out_split), math.prod(spec.in_split)


def fitted(weight, spec, metric=None):
    factors = FORMAT.fit(weight, metric or Metric(), spec)
    return FORMAT.reconstruct(shape_of(spec), spec, factors)


def uneven(gaussian, size, seed=0):
    x = gaussian(3 * size, size, seed=seed) * torch.exp(1.5 * gaussian(size, seed=seed + 1))
    return x.T @ x / len(x)


def under_data(gaussian, m, n):
    yield InputMoment(uneven(gaussian, n))
    yield Metric(Side(uneven(gaussian, m, seed=3)), Side(uneven(gaussian, n)))
    yield Elementwise(gaussian(m, n, seed=4).square())


@given(split=splits, closing=st.sampled_from([1, 2, 3]), seed=seeds)
def test_full_ranks_are_exact(split, closing, seed, gaussian):
    out, inp = split
    pairs = [a * b for a, b in zip(out, inp, strict=True)]
    if min(pairs[0], math.prod(pairs[1:])) % closing:
        closing = 1  # the first cut must come out whole
    spec = spec_of(out, inp, 1.0, closing)
    weight = gaussian(*shape_of(spec), seed=seed)
    torch.testing.assert_close(fitted(weight, spec), weight, atol=1e-10, rtol=0)


@given(split=splits, part=parts, closing=st.integers(1, 3), seed=seeds)
def test_least_squares_never_raise_the_error_of_tr_svd(split, part, closing, seed, gaussian):
    spec = spec_of(*split, part, closing)
    shape = shape_of(spec)
    weight, network = gaussian(*shape, seed=seed), FORMAT.network(shape, spec)
    for metric in (Metric(), InputMoment(uneven(gaussian, shape[1]))):
        decompose = tensor_ring._tr_svd(network, spec)
        start, error = closed_form(network, weight, metric, decompose)
        history = als(network, weight, metric, start).objective
        floor = 1e-12 * history[0]
        assert all(after <= before + floor for before, after in itertools.pairwise(history))
        assert metric.relative(weight, fitted(weight, spec, metric)) <= error + 1e-9


@given(split=splits, part=parts, closing=st.integers(1, 3), seed=seeds)
def test_the_error_of_tr_svd_is_the_sum_of_what_it_cuts(split, part, closing, seed, gaussian):
    """Cores before the last are orthonormal, so that what a cut loses adds up in squares."""
    spec = spec_of(*split, part, closing)
    shape, order = shape_of(spec), len(spec.ranks)
    weight, network = gaussian(*shape, seed=seed), FORMAT.network(shape, spec)
    tensor = weight.reshape(*spec.out_split, *spec.in_split)
    factors = tensor_ring._tr_svd(network, spec)(tensor)
    for name in list(factors)[:-1]:
        core = factors[name]
        rows = core.reshape(-1, core.shape[-1])
        if name == "core0":  # the first cut is over both bonds of the first core
            closing, second = spec.ranks[:2]
            rows = core.reshape(closing, -1, second).movedim(1, 0).reshape(-1, closing * second)
        eye = torch.eye(rows.shape[1], dtype=rows.dtype)
        torch.testing.assert_close(rows.T @ rows, eye, atol=1e-8, rtol=0)
    error = (weight - FORMAT.reconstruct(shape, spec, factors)).square().sum()
    rest = factors[f"core{order - 1}"].square().sum()
    torch.testing.assert_close(error, weight.square().sum() - rest, atol=1e-8, rtol=0)


@given(seed=st.sampled_from([0, 1, 2, 3, 4, 5]))
def test_a_planted_ring_of_four_cores_is_recovered(seed, gaussian):
    spec = TensorRingSpec((2,) * 4, (2,) * 4, (2,) * 4)
    network = FORMAT.network((16, 16), spec)
    names = enumerate(network.factors)
    cores = {name: gaussian(*network.shape_of(name), seed=10 * seed + k) for k, name in names}
    weight = FORMAT.reconstruct((16, 16), spec, cores)
    assert Metric().relative(weight, fitted(weight, spec)) < 1e-6
    assert network.params == 64  # a train of the same cut needs 4 at every bond


@given(split=splits, part=parts, seed=seeds)
def test_a_ring_closed_by_rank_one_is_a_train_and_no_worse(split, part, seed, gaussian):
    spec = spec_of(*split, part, 1)
    shape = shape_of(spec)
    train = tensor_train.TensorTrainSpec(spec.out_split, spec.in_split, spec.ranks[1:])
    assert FORMAT.network(shape, spec).factors == {
        name: modes.translate(str.maketrans("opqrstu", "pqrstuv"))
        for name, modes in tensor_train.FORMAT.network(shape, train).factors.items()
    }
    weight = gaussian(*shape, seed=seed)
    for metric in (Metric(), InputMoment(uneven(gaussian, shape[1]))):
        factors = tensor_train.FORMAT.fit(weight, metric, train)
        theirs = tensor_train.FORMAT.reconstruct(shape, train, factors)
        error = metric.relative(weight, fitted(weight, spec, metric))
        assert error <= metric.relative(weight, theirs) + 1e-9


@given(split=splits, part=parts, closing=st.integers(1, 3), seed=seeds)
def test_apply_equals_dense_and_costs_are_exact(split, part, closing, seed, gaussian):
    spec = spec_of(*split, part, closing)
    shape = shape_of(spec)
    weight, network = gaussian(*shape, seed=seed), FORMAT.network(shape, spec)
    factors = FORMAT.fit(weight, Metric(), spec)
    assert network.params == sum(factor.numel() for factor in factors.values())
    layer = FactorizedLinear(network, bias=False, dtype=torch.float64)
    layer.store(fix(network, factors))
    x = gaussian(5, shape[1], seed=seed + 1)
    expected = x @ FORMAT.reconstruct(shape, spec, factors).T
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-10)


def test_data_lower_the_error(gaussian):
    weight, spec = gaussian(12, 8), TensorRingSpec((2, 3, 2), (2, 2, 2), (2, 2, 3))
    for metric in under_data(gaussian, 12, 8):
        error = metric.relative(weight, fitted(weight, spec, metric))
        assert error < 0.95 * metric.relative(weight, fitted(weight, spec))


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.4])
def test_a_tolerance_is_met_under_data(tolerance, gaussian):
    weight = gaussian(12, 8)
    for metric in under_data(gaussian, 12, 8):
        for spec in FORMAT.within(weight, metric, {}, tolerance):
            assert metric.relative(weight, fitted(weight, spec, metric)) <= tolerance


def test_bonds_too_wide_for_least_squares_keep_their_tr_svd(gaussian, monkeypatch):
    weight, spec = gaussian(12, 8), TensorRingSpec((2, 3, 2), (2, 2, 2), (2, 2, 3))
    improved = Metric().relative(weight, fitted(weight, spec))
    monkeypatch.setattr(tensor_ring, "WIDEST", 5)
    network = FORMAT.network((12, 8), spec)
    _, start = closed_form(network, weight, Metric(), tensor_ring._tr_svd(network, spec))
    assert Metric().relative(weight, fitted(weight, spec)) == pytest.approx(start)
    assert improved < start


def test_options_fix_the_spec():
    def specs(**options):
        return FORMAT.candidates((12, 8), options, Ceiling())

    assert {spec.ranks[0] for spec in specs()} == {1, 2, 4}
    assert {spec.ranks for spec in specs(ranks=[2])} == {(1, 2, 2), (2, 2, 2)}
    assert [spec.ranks for spec in specs(ranks=[2, 2, 3])] == [(2, 2, 3)]
    assert {spec.out_split for spec in specs(out_split=(2, 6, 1))} == {(2, 6, 1)}
    [spec] = specs(out_split=[3, 2, 2], in_split=[2, 2, 2], ranks=[3, 2, 4])
    assert spec == TensorRingSpec((3, 2, 2), (2, 2, 2), (3, 2, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"out_split": (3, 2, 2), "in_split": (2, 2, 2, 1)},
        {"out_split": (3, 4)},
        {"ranks": (2, 2)},
        {"ranks": (2, 2, 1000)},
        {"ranks": (3, 3, 2)},
        {"out_split": (3, 2, 2), "ranks": (2, 2, 2, 2)},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RankError):
        FORMAT.candidates((12, 8), options, Ceiling())
