from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlm.decompositions import kronecker, low_rank, normal, tensor_train, token_mps, tucker
from tnlm.decompositions.als import als
from tnlm.decompositions.whitening import closed_form, grown, rebuild, unwhiten, whiten
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side

SHAPE = (12, 8)
SPECS = {
    "low-rank": (low_rank.FORMAT, low_rank.LowRankSpec(3)),
    "kron": (kronecker.FORMAT, kronecker.KroneckerSpec(3, (3, 4), (4, 2))),
    "kron-outer": (kronecker.FORMAT, kronecker.KroneckerSpec(2, (12, 1), (2, 4))),
    "tt": (tensor_train.FORMAT, tensor_train.TensorTrainSpec((2, 3, 2), (2, 2, 2), (3, 3))),
    "tt-ones": (tensor_train.FORMAT, tensor_train.TensorTrainSpec((1, 12), (8, 1), (4,))),
    "tucker": (tucker.FORMAT, tucker.TuckerSpec((3, 4), (8,), (2, 3, 5))),
    "tucker-part": (tucker.FORMAT, tucker.TuckerSpec((3, 4), (2, 4), (3, 2, 2, 3))),
    "tucker-matrix": (tucker.FORMAT, tucker.TuckerSpec((12,), (8,), (3, 3))),
    "mps": (token_mps.FORMAT, token_mps.TokenMPSSpec((2, 4), (1,))),
}
FULL = {
    "low-rank": (low_rank.FORMAT, low_rank.LowRankSpec(8)),
    "kron": (kronecker.FORMAT, kronecker.KroneckerSpec(8, (3, 4), (4, 2))),
    "tt": (tensor_train.FORMAT, tensor_train.TensorTrainSpec((2, 3, 2), (2, 2, 2), (4, 4))),
    "tucker": (tucker.FORMAT, tucker.TuckerSpec((3, 4), (8,), (3, 4, 8))),
}
METRICS = (
    "identity",
    "input",
    "few-tokens",
    "two-sided",
    "diagonal",
    "diagonal-outputs",
    "element-wise",
)
SINGULAR = ("zero-inputs", "dead-column", "rank-one", "dead-rows", "zero-weights")
names, kinds, seeds = st.sampled_from(sorted(SPECS)), st.sampled_from(METRICS), st.integers(0, 20)


@pytest.fixture(scope="module")
def metric_of(gaussian):
    def spread(size, seed):
        return torch.exp(1.5 * gaussian(size, seed=seed))

    def moment(size, seed, count=30):
        x = gaussian(count, size, seed=seed) * spread(size, seed + 1)
        return x.T @ x / count

    def make(kind, seed=0, shape=SHAPE):
        m, n = shape
        dead = torch.ones(n, dtype=torch.float64)
        dead[1] = 0.0
        return {
            "identity": lambda: Metric(),
            "input": lambda: InputMoment(moment(n, seed)),
            "few-tokens": lambda: InputMoment(moment(n, seed, 3)),
            "two-sided": lambda: Metric(Side(moment(m, seed + 5)), Side(moment(n, seed))),
            "diagonal": lambda: Metric(Side(spread(m, seed)), Side(spread(n, seed + 1))),
            "diagonal-outputs": lambda: Metric(outputs=Side(spread(m, seed))),
            "element-wise": lambda: Elementwise(gaussian(m, n, seed=seed).square()),
            "zero-inputs": lambda: Metric(inputs=Side(torch.zeros(n, n))),
            "dead-column": lambda: Metric(inputs=Side(moment(n, seed) * torch.outer(dead, dead))),
            "rank-one": lambda: Metric(inputs=Side(moment(n, seed, 1))),
            "dead-rows": lambda: Metric(Side((torch.arange(m) % 2).double())),
            "zero-weights": lambda: Elementwise((gaussian(m, n, seed=seed) > 1).double()),
        }[kind]()

    return make


def start_of(structure, spec, weight):
    return structure.fit(weight, Metric(), spec)


@given(name=names, kind=kinds, seed=seeds)
def test_the_error_never_rises(name, kind, seed, gaussian, metric_of):
    structure, spec = SPECS[name]
    network, metric = structure.network(SHAPE, spec), metric_of(kind, seed)
    weight = gaussian(*SHAPE, seed=seed)
    start = start_of(structure, spec, weight)
    factors, objective = als(network, weight, metric, start, sweeps=6, stall=0.0)
    size = metric.norm(weight) ** 2
    assert objective[0] == pytest.approx(metric.norm(weight - rebuild(network, start)) ** 2)
    assert all(later <= earlier + 1e-9 * size for earlier, later in itertools.pairwise(objective))
    final = metric.norm(weight - rebuild(network, factors)) ** 2
    assert final == pytest.approx(objective[-1], abs=1e-9 * size)


@settings(max_examples=15)
@given(name=names, kind=kinds, seed=seeds)
def test_each_half_step_is_the_least_squares_solution(name, kind, seed, gaussian, metric_of):
    structure, spec = SPECS[name]
    network, metric = structure.network(SHAPE, spec), metric_of(kind, seed)
    weight, last = gaussian(*SHAPE, seed=seed), list(network.factors)[-1]
    start = start_of(structure, spec, weight)
    factors, _ = als(network, weight, metric, start, sweeps=1, steps=100, spent=0.0)
    # Oracle: LAPACK on the design matrix of the last factor, every column rebuilt by itself.
    size = network.size(network.factors[last])
    units = torch.eye(size, dtype=torch.float64).reshape(size, *network.shape_of(last))
    columns = [rebuild(network, factors | {last: unit}).flatten() for unit in units]
    design = torch.stack(columns, 1)
    normal = torch.stack([metric.pull(c.reshape(SHAPE)).flatten() for c in columns])
    solution = torch.linalg.lstsq(normal @ design, normal @ weight.flatten(), driver="gelsd")[0]
    best = metric.norm(weight - (design @ solution).reshape(SHAPE))
    found = metric.norm(weight - rebuild(network, factors))
    assert found == pytest.approx(best, abs=1e-6 * metric.norm(weight))


@pytest.mark.parametrize("kind", ["input", "two-sided", "element-wise"])
@pytest.mark.parametrize("name", ["kron", "low-rank", "tt", "tucker"])
def test_the_gradient_vanishes_at_the_end(name, kind, gaussian, metric_of):
    structure, spec = SPECS[name]
    network, metric, weight = structure.network(SHAPE, spec), metric_of(kind), gaussian(*SHAPE)
    start = structure.fit(weight, metric, spec)
    factors, _ = als(network, weight, metric, start, sweeps=60, stall=1e-9, spent=1e-4)
    leaves = {key: value.clone().requires_grad_() for key, value in factors.items()}
    error = weight - rebuild(network, leaves)
    (error * metric.pull(error)).sum().backward()
    for key, leaf in leaves.items():
        # Relative to the gradient of the norm of the approximation itself.
        scale = metric.norm(weight) ** 2 / float(factors[key].norm())
        assert float(leaf.grad.norm()) <= 3e-3 * scale


@pytest.mark.parametrize("name", sorted(FULL))
@pytest.mark.parametrize("kind", METRICS)
def test_full_rank_is_exact_under_every_metric(name, kind, gaussian, metric_of):
    structure, spec = FULL[name]
    weight, metric = gaussian(*SHAPE), metric_of(kind)
    rebuilt = structure.reconstruct(SHAPE, spec, structure.fit(weight, metric, spec))
    torch.testing.assert_close(rebuilt, weight, atol=1e-9, rtol=0)


@given(name=names.filter(lambda name: name != "mps"), kind=kinds, seed=seeds)
def test_data_never_hurts(name, kind, seed, gaussian, metric_of):
    structure, spec = SPECS[name]
    weight, metric = gaussian(*SHAPE, seed=seed), metric_of(kind, seed)
    errors = [
        metric.relative(weight, structure.reconstruct(SHAPE, spec, factors))
        for factors in (structure.fit(weight, metric, spec), start_of(structure, spec, weight))
    ]
    assert errors[0] <= errors[1] + 1e-9
    [reported] = structure.errors(weight, metric, [spec])
    if structure in (tensor_train.FORMAT, tucker.FORMAT) and kind != "identity":
        assert errors[0] <= reported + 1e-9


@pytest.mark.parametrize("name", sorted(set(SPECS) - {"mps"}))
@pytest.mark.parametrize("kind", SINGULAR)
def test_what_weighs_nothing_does_no_harm(name, kind, gaussian, metric_of):
    structure, spec = SPECS[name]
    metric = metric_of(kind)
    for weight in (gaussian(*SHAPE), torch.zeros(SHAPE), torch.ones(SHAPE)):
        factors = structure.fit(weight, metric, spec)
        rebuilt = structure.reconstruct(SHAPE, spec, factors)
        assert all(bool(factor.isfinite().all()) for factor in factors.values())
        assert metric.relative(weight, rebuilt) <= 1.0
        # Nothing that the metric hardly sees may blow up.
        assert float(rebuilt.abs().max()) <= 1e4 * max(float(weight.abs().max()), 1e-300)
        assert all(math.isfinite(e) for e in structure.errors(weight, metric, [spec]))
        if kind == "zero-inputs":
            plain = structure.reconstruct(SHAPE, spec, start_of(structure, spec, weight))
            assert Metric().norm(weight - rebuilt) <= Metric().norm(weight - plain) + 1e-9


@pytest.mark.parametrize("name", ["kron", "tt", "tucker", "low-rank"])
def test_the_direct_and_the_iterative_solution_agree(name, gaussian, metric_of, monkeypatch):
    structure, spec = SPECS[name]
    network, weight = structure.network(SHAPE, spec), gaussian(*SHAPE)
    for kind in ("input", "two-sided", "diagonal-outputs"):
        metric, start = metric_of(kind), start_of(structure, spec, weight)
        results = []
        for limit in (10**6, 0):
            monkeypatch.setattr(normal, "DIRECT", limit)
            results.append(als(network, weight, metric, start, sweeps=2, steps=200, spent=0.0))
        direct, iterative = results
        assert direct.objective == pytest.approx(iterative.objective, rel=1e-6)


@pytest.mark.parametrize("name", ["kron", "tt", "tucker"])
@pytest.mark.parametrize("kind", ["input", "two-sided", "diagonal", "diagonal-outputs"])
def test_a_direct_solution_takes_one_iteration(name, kind, gaussian, metric_of):
    structure, spec = SPECS[name]
    network, weight, metric = structure.network(SHAPE, spec), gaussian(*SHAPE), metric_of(kind)
    start = start_of(structure, spec, weight)
    one = als(network, weight, metric, start, sweeps=2, steps=1).objective
    many = als(network, weight, metric, start, sweeps=2, steps=50, spent=0.0).objective
    assert one == pytest.approx(many, rel=1e-6)


def test_iterations_agree_where_the_metric_is_separable_over_modes(
    gaussian, metric_of, monkeypatch
):
    monkeypatch.setattr(normal, "DIRECT", 0)
    structure, spec = SPECS["kron"]
    pairs = [metric_of("input", seed, (1, n)).inputs.values for seed, n in ((1, 4), (2, 2))]
    metric = Metric(inputs=Side(torch.kron(*pairs)))
    network, weight = structure.network(SHAPE, spec), gaussian(*SHAPE)
    start = start_of(structure, spec, weight)
    one = als(network, weight, metric, start, sweeps=3, steps=1).objective
    many = als(network, weight, metric, start, sweeps=3, steps=50, spent=0.0).objective
    assert one == pytest.approx(many, rel=1e-6)


def test_it_stops_at_its_limits_and_leaves_its_start_alone(gaussian, metric_of):
    structure, spec = SPECS["kron"]
    network, weight, metric = structure.network(SHAPE, spec), gaussian(*SHAPE), metric_of("input")
    start = start_of(structure, spec, weight)
    before = {name: factor.clone() for name, factor in start.items()}
    assert len(als(network, weight, metric, start, sweeps=3, stall=0.0).objective) == 1 + 3 * 2
    assert len(als(network, weight, metric, start, stall=1.0).objective) == 1 + 2
    assert all(torch.equal(start[name], before[name]) for name in start)
    exact = rebuild(network, start)
    assert len(als(network, exact, metric, start).objective) == 1
    twice = [als(network, weight, metric, start).objective for _ in range(2)]
    assert twice[0] == twice[1]


def test_whitening_is_undone_factor_by_factor(gaussian, metric_of):
    structure, spec = SPECS["tt"]
    network = structure.network(SHAPE, spec)
    factors = start_of(structure, spec, gaussian(*SHAPE))
    sizes = [network.sizes[mode] for mode in network.out + network.inp]
    sides = [metric_of("input", k, (1, size)).inputs for k, size in enumerate(sizes)]
    sides[2] = None
    undone = rebuild(network, unwhiten(network, factors, sides)).reshape(sizes)
    expected = rebuild(network, factors).reshape(sizes)
    torch.testing.assert_close(whiten(undone, sides), expected, atol=1e-9, rtol=0)


def test_the_better_of_two_closed_forms_is_taken(gaussian, metric_of):
    structure, spec = SPECS["low-rank"]
    network, weight, metric = structure.network(SHAPE, spec), gaussian(*SHAPE), metric_of("input")

    def truncate(tensor):
        left, right = Metric().low_rank(tensor.reshape(SHAPE), spec.rank)
        return {"left": left, "right": right}

    # Without a reshape, the whitened form is the optimum itself.
    [optimum] = structure.errors(weight, metric, [spec])
    assert closed_form(network, weight, metric, truncate)[1] == pytest.approx(optimum, abs=1e-6)
    exact = closed_form(network, rebuild(network, truncate(weight)), metric, truncate)
    assert exact[1] < 1e-10


def test_specs_grow_until_their_error_is_within():
    tried = []

    def error_of(spec):
        tried.append(spec)
        return 3.0 * spec

    assert grown(lambda bound: bound, error_of, 0.6) <= 0.2
    assert tried[0] == 0.6
    # What can never be met ends.
    assert grown(lambda bound: bound, lambda _: 1.0, 0.5) < 1e-11
