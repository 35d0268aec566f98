from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import parafac

from tnlm.decompositions._tensorly import torch_backend
from tnlm.decompositions.als import als
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.cp import FORMAT, SWEEPS, CPSpec
from tnlm.decompositions.cp_fit import largest_terms, normalised, term_energies
from tnlm.decompositions.whitening import closed_form, rebuild
from tnlm.errors import RankError
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.contraction import chain

splits = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)
seeds = st.integers(0, 20)


def spec_of(out, inp, part):
    limit = math.prod(out + inp) // max(out + inp)
    return CPSpec(max(1, round(part * limit)), out, inp)


def shape_of(spec):
    return math.prod(spec.out_split), math.prod(spec.in_split)


def moment(gaussian, size, seed):
    x = gaussian(3 * size, size, seed=seed) * torch.exp(1.5 * gaussian(size, seed=seed + 1))
    return x.T @ x / len(x)


def under_data(gaussian, m, n):
    yield Metric()
    yield InputMoment(moment(gaussian, n, 1))
    yield Metric(Side(moment(gaussian, m, 3)), Side(moment(gaussian, n, 1)))
    yield Elementwise(gaussian(m, n, seed=4).square())


@given(out=splits, inp=splits, part=st.floats(0, 1), seed=seeds)
def test_terms_are_orthogonal_and_their_tail_is_the_error(out, inp, part, seed, gaussian):
    spec = spec_of(out, inp, part)
    tensor = gaussian(*shape_of(spec), seed=seed).reshape(out + inp)
    network, energies = FORMAT.network(shape_of(spec), spec), term_energies(tensor)
    rebuilt = rebuild(network, largest_terms(tensor, spec.rank)).reshape(out + inp)
    lost = float(energies[spec.rank :].sum())
    assert float((tensor - rebuilt).square().sum()) == pytest.approx(lost, abs=1e-10)
    assert len(energies) <= math.prod(out + inp) // max(out + inp)


@given(out=splits, inp=splits, part=st.floats(0, 1), seed=seeds, kind=st.integers(0, 3))
def test_least_squares_never_raise_the_error(out, inp, part, seed, kind, gaussian):
    spec = spec_of(out, inp, part)
    shape = shape_of(spec)
    weight, network = gaussian(*shape, seed=seed), FORMAT.network(shape, spec)
    metric = list(under_data(gaussian, *shape))[kind]
    terms = partial(largest_terms, rank=spec.rank)
    start, error = closed_form(network, weight, metric, terms)
    history = als(network, weight, metric, start, sweeps=4).objective
    floor = 1e-12 * history[0]
    assert all(after <= before + floor for before, after in itertools.pairwise(history))
    rebuilt = FORMAT.reconstruct(shape, spec, FORMAT.fit(weight, metric, spec))
    assert metric.relative(weight, rebuilt) <= error + 1e-9


def test_columns_have_unit_norm_but_for_the_last_mode(gaussian):
    spec = CPSpec(5, (3, 4), (2, 4))
    *units, _ = FORMAT.fit(gaussian(12, 8), Metric(), spec).values()
    for factor in units:
        torch.testing.assert_close(factor.norm(dim=0), torch.ones(5).double())
    assert not normalised({"mode0": torch.zeros(2, 1), "mode1": torch.zeros(3, 1)})["mode1"].any()


def test_it_is_as_good_as_as_many_sweeps_of_parafac(gaussian):
    weight = sum(
        torch.kron(gaussian(3, 2, seed=k), gaussian(4, 4, seed=k + 9)) * 0.5**k for k in range(4)
    )
    spec = CPSpec(8, (3, 4), (2, 4))
    ours = FORMAT.reconstruct((12, 8), spec, FORMAT.fit(weight, Metric(), spec))
    with torch_backend():
        tensor = weight.reshape(3, 4, 2, 4)
        theirs = parafac(tensor, 8, n_iter_max=SWEEPS, init="random", random_state=0)
        error = Metric().relative(weight, theirs.to_tensor().reshape(12, 8))
    assert Metric().relative(weight, ours) <= 1.1 * error


def test_multiply_adds_grow_with_the_number_of_terms(gaussian):
    network = FORMAT.network((12, 8), CPSpec(5, (3, 4), (2, 4)))
    assert network.params == 5 * (3 + 4 + 2 + 4)
    assert chain(network).macs == 5 * (8 + 2 + 3 + 12)  # the longer mode of the inputs goes first


def test_the_budget_bounds_both_costs():
    for spec in FORMAT.candidates((12, 8), {}, Ceiling(60, 90)):
        network = FORMAT.network((12, 8), spec)
        assert network.params <= 60
        assert chain(network).macs <= 90
    assert FORMAT.candidates((12, 8), {"rank": 3}, Ceiling(30)) == []


def test_of_several_specs_the_most_promising_is_fitted(gaussian):
    weight = gaussian(12, 8)
    specs = FORMAT.candidates((12, 8), {}, Ceiling(60))
    errors = FORMAT.errors(weight, Metric(), specs)
    assert len(specs) == 3
    assert sorted(math.isinf(error) for error in errors) == [False, True, True]


def test_what_cannot_be_had_is_refused():
    with pytest.raises(RankError, match="rank=99; a 12x8 matrix needs at most 24 terms"):
        FORMAT.candidates((12, 8), {"rank": 99}, Ceiling())
    with pytest.raises(RankError, match="at most 8 sizes in both"):
        FORMAT.network((12, 8), CPSpec(1, (12, 1, 1, 1, 1), (8, 1, 1, 1)))


def test_a_curve_falls_and_is_near_the_fits(gaussian):
    weight = gaussian(12, 8)
    for metric in under_data(gaussian, 12, 8):
        curve = FORMAT.curve(weight, metric, {}, 3 * weight.numel())
        errors = [error for _, error in curve]
        assert errors == sorted(errors, reverse=True)
        spec, guess = curve[-1]
        assert guess >= 0.5 * FORMAT.errors(weight, metric, [spec])[0]
