from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tnlm.decompositions import kronecker
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.tensor_train import FORMAT, TensorTrainSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.rearrange import rearrange

modes, seeds, parts = st.integers(1, 4), st.integers(0, 20), st.floats(0, 1)


def limits(out, inp):
    pairs = [a * b for a, b in zip(out, inp, strict=True)]
    return [min(math.prod(pairs[:k]), math.prod(pairs[k:])) for k in range(1, len(pairs))]


def unfoldings(weight, out, inp):
    """Return, by a route of its own, the matrix at every cut of the train."""
    order = len(out)
    tensor = weight.reshape(*out, *inp)
    for k in range(1, order):
        left = [*range(k), *range(order, order + k)]
        right = [*range(k, order), *range(order + k, 2 * order)]
        yield tensor.permute(left + right).reshape(math.prod(out[:k]) * math.prod(inp[:k]), -1)


def fitted(weight, spec):
    shape = tuple(weight.shape)
    return FORMAT.reconstruct(shape, spec, FORMAT.fit(weight, Metric(), spec))


@given(out=st.tuples(modes, modes), inp=st.tuples(modes, modes), part=parts, seed=seeds)
def test_two_cores_are_a_sum_of_kronecker_products(out, inp, part, seed, gaussian):
    weight = gaussian(math.prod(out), math.prod(inp), seed=seed)
    rank = max(1, round(part * limits(out, inp)[0]))
    train = TensorTrainSpec(out, inp, (rank,))
    terms = kronecker.KroneckerSpec(rank, out, inp, gauge=False)
    factors = kronecker.FORMAT.fit(weight, Metric(), terms)
    expected = kronecker.FORMAT.reconstruct(tuple(weight.shape), terms, factors)
    torch.testing.assert_close(fitted(weight, train), expected, atol=1e-9, rtol=0)
    networks = [
        structure.network(tuple(weight.shape), spec)
        for structure, spec in [(FORMAT, train), (kronecker.FORMAT, terms)]
    ]
    assert networks[0].params == networks[1].params


@given(
    order=st.integers(2, 4),
    sizes=st.lists(st.integers(1, 3), min_size=8, max_size=8),
    part=parts,
    seed=seeds,
)
def test_the_error_is_at_most_the_sum_of_tails(order, sizes, part, seed, gaussian):
    out, inp = tuple(sizes[:order]), tuple(sizes[4 : 4 + order])
    weight = gaussian(math.prod(out), math.prod(inp), seed=seed)
    ranks = tuple(max(1, round(part * limit)) for limit in limits(out, inp))
    error = float((weight - fitted(weight, TensorTrainSpec(out, inp, ranks))).square().sum())
    tails = [
        float(torch.linalg.svdvals(rows)[rank:].square().sum())
        for rows, rank in zip(unfoldings(weight, out, inp), ranks, strict=True)
    ]
    # Oseledets, theorem 2.2; and no train of these ranks can beat any one tail.
    assert max(tails) - 1e-9 <= error <= sum(tails) + 1e-9


@given(ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=seeds)
def test_a_train_is_recovered_from_its_matrix(ranks, seed, gaussian):
    out, inp = (2, 3, 2), (3, 2, 2)
    assume(all(rank <= limit for rank, limit in zip(ranks, limits(out, inp), strict=True)))
    spec = TensorTrainSpec(out, inp, ranks)
    network = FORMAT.network((12, 12), spec)
    names = enumerate(network.factors)
    cores = {name: gaussian(*network.shape_of(name), seed=seed + k) for k, name in names}
    weight = FORMAT.reconstruct((12, 12), spec, cores)
    torch.testing.assert_close(fitted(weight, spec), weight, atol=1e-9, rtol=0)
    [found] = FORMAT.within(weight, Metric(), {"out_split": out, "in_split": inp}, 1e-6)
    assert all(a <= b for a, b in zip(found.ranks, ranks, strict=True))


def test_the_first_modes_are_the_outermost(gaussian):
    parts = [gaussian(2, 3), gaussian(3, 2, seed=1), gaussian(2, 2, seed=2)]
    weight = torch.kron(torch.kron(parts[0], parts[1]), parts[2])
    spec = TensorTrainSpec((2, 3, 2), (3, 2, 2), (1, 1))
    torch.testing.assert_close(fitted(weight, spec), weight, atol=1e-10, rtol=0)
    swapped = torch.kron(torch.kron(parts[2], parts[1]), parts[0])
    assert float((fitted(swapped, spec) - swapped).norm()) > 0.1


@given(tolerance=st.floats(0.01, 0.99), seed=seeds)
def test_a_tolerance_is_met_with_no_rank_to_spare(tolerance, seed, gaussian):
    weight = gaussian(12, 8, seed=seed)
    for spec in FORMAT.within(weight, Metric(), {}, tolerance):
        assert Metric().relative(weight, fitted(weight, spec)) <= tolerance
        share = tolerance**2 / len(spec.ranks) * float(weight.square().sum())
        pairs = zip(unfoldings(weight, spec.out_split, spec.in_split), spec.ranks, strict=True)
        for rows, rank in pairs:
            tail = torch.linalg.svdvals(rows)[rank - 1 :].square().sum()
            assert rank == 1 or float(tail) > share


def test_within_takes_two_cores_at_the_tail_itself(gaussian):
    weight = gaussian(12, 8)
    values = torch.linalg.svdvals(rearrange(weight, (3, 4), (2, 4)))
    tolerance = float(values[3:].norm() / values.norm()) + 1e-9
    options = {"out_split": (3, 4), "in_split": (2, 4)}
    assert FORMAT.within(weight, Metric(), options, tolerance)[0].ranks == (3,)


def test_options_fix_the_spec():
    def specs(**options):
        return FORMAT.candidates((12, 8), options, Ceiling())

    assert {len(spec.out_split) for spec in specs()} == {2, 3}
    assert {spec.ranks for spec in specs(ranks=[2])} == {(2,), (2, 2)}
    assert [spec.ranks for spec in specs(ranks=[2, 3])] == [(2, 3)]
    assert [spec.out_split for spec in specs(out_split=(2, 6))] == [(2, 6)]
    [spec] = specs(out_split=[3, 2, 2], in_split=[2, 2, 2], ranks=[3, 2])
    assert spec == TensorTrainSpec((3, 2, 2), (2, 2, 2), (3, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"out_split": (3, 4), "in_split": (2, 2, 2)},
        {"out_split": (3, 4), "ranks": (2, 2)},
        {"ranks": (2, 1000)},
        {"out_split": (12,)},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RankError):
        FORMAT.candidates((12, 8), options, Ceiling())


def uneven(gaussian, size, seed=0):
    x = gaussian(3 * size, size, seed=seed) * torch.exp(1.5 * gaussian(size, seed=seed + 1))
    return x.T @ x / len(x)


def under_data(gaussian, m, n):
    yield InputMoment(uneven(gaussian, n))
    yield Metric(Side(uneven(gaussian, m, seed=3)), Side(uneven(gaussian, n)))
    yield Elementwise(gaussian(m, n, seed=4).square())


def test_data_lower_the_error_and_the_report_is_an_upper_bound(gaussian):
    weight, spec = gaussian(12, 8), TensorTrainSpec((2, 3, 2), (2, 2, 2), (3, 3))
    for metric in under_data(gaussian, 12, 8):
        factors = FORMAT.fit(weight, metric, spec)
        error = metric.relative(weight, FORMAT.reconstruct((12, 8), spec, factors))
        assert error < 0.95 * metric.relative(weight, fitted(weight, spec))
        assert error <= FORMAT.errors(weight, metric, [spec])[0]
        for core in list(factors.values())[:-1]:
            gram = core.reshape(-1, core.shape[-1]).T @ core.reshape(-1, core.shape[-1])
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.4])
def test_a_tolerance_is_met_under_data(tolerance, gaussian):
    weight = gaussian(12, 8)
    for metric in under_data(gaussian, 12, 8):
        for spec in FORMAT.within(weight, metric, {}, tolerance):
            factors = FORMAT.fit(weight, metric, spec)
            rebuilt = FORMAT.reconstruct((12, 8), spec, factors)
            assert metric.relative(weight, rebuilt) <= tolerance
            # What the planner is told must hold as well.
            assert FORMAT.errors(weight, metric, [spec])[0] <= tolerance
