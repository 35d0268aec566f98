from __future__ import annotations

import itertools
import math

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import tucker as tensorly_tucker

from tnlm.decompositions import hooi
from tnlm.decompositions.base import Ceiling, as_tensor
from tnlm.decompositions.tucker import FORMAT, TuckerSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.gauge import expand, fix
from tnlm.tensors.linalg import truncated_svd

seeds, parts = st.integers(0, 20), st.floats(0, 1)
splits = st.sampled_from([((4,), (2, 3)), ((2, 3), (5,)), ((3, 2), (2, 4)), ((2, 2, 2), (3, 3))])


def unfold(tensor, mode):
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def error_of(weight, spec):
    """Return the squared error of the fit."""
    shape = tuple(weight.shape)
    rebuilt = FORMAT.reconstruct(shape, spec, FORMAT.fit(weight, Metric(), spec))
    return float((weight - rebuilt).square().sum())


def realisable(dims, parts):
    """Return ranks at about ``parts`` of the modes that the other modes can support."""
    ranks = [max(1, round(part * d)) for part, d in zip(itertools.cycle(parts), dims, strict=False)]
    while any(r > math.prod(ranks) // r for r in ranks):
        largest = ranks.index(max(ranks))
        ranks[largest] = math.prod(ranks) // ranks[largest]
    return tuple(ranks)


@given(split=splits, parts=st.tuples(parts, parts, parts), seed=seeds)
def test_hooi_is_within_the_hosvd_bound(split, parts, seed, gaussian):
    out, inp = split
    weight = gaussian(math.prod(out), math.prod(inp), seed=seed)
    spec = TuckerSpec(out, inp, realisable(out + inp, parts))
    tensor = as_tensor(weight, out, inp)
    tails = [
        float(torch.linalg.svdvals(unfold(tensor, mode))[rank:].square().sum())
        for mode, rank in enumerate(spec.ranks)
    ]
    [relative] = FORMAT.errors(weight, Metric(), [spec])
    hosvd = relative**2 * float(weight.square().sum())
    # De Lathauwer et al.: HOSVD leaves at most the sum of the tails; nothing beats any one of them.
    assert max(tails) - 1e-7 <= error_of(weight, spec) <= hosvd + 1e-7
    assert hosvd <= sum(tails) + 1e-7


@given(split=splits, parts=st.tuples(parts, parts, parts), seed=seeds)
def test_every_sweep_of_hooi_lowers_the_error(split, parts, seed, gaussian):
    out, inp = split
    weight = gaussian(math.prod(out), math.prod(inp), seed=seed)
    spec = TuckerSpec(out, inp, realisable(out + inp, parts))
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooi, "STALL", -1.0)  # never stop early
        for sweeps in range(5):
            patch.setattr(hooi, "SWEEPS", sweeps)
            errors.append(error_of(weight, spec))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))


def test_hooi_improves_on_the_hosvd(gaussian):
    weight, spec = gaussian(12, 12), TuckerSpec((3, 4), (12,), (2, 2, 3))
    [hosvd] = FORMAT.errors(weight, Metric(), [spec])
    assert error_of(weight, spec) ** 0.5 < 0.999 * hosvd * float(weight.norm())


def test_hooi_ends_where_tensorlys_does(gaussian, monkeypatch):
    monkeypatch.setattr(hooi, "SWEEPS", 100)
    weight, spec = gaussian(12, 10), TuckerSpec((3, 4), (10,), (2, 3, 4))
    tensor = as_tensor(weight, (3, 4), (10,)).numpy()
    core, factors = tensorly_tucker(tensor, list(spec.ranks), n_iter_max=200, tol=1e-12)
    oracle = tensorly.norm(tensor - tensorly.tucker_to_tensor((core, factors))) ** 2
    assert error_of(weight, spec) == pytest.approx(float(oracle), rel=1e-3)


@given(m=st.integers(1, 9), n=st.integers(1, 9), part=parts, seed=seeds)
def test_two_modes_are_the_truncated_svd_without_a_core(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), max(1, round(part * min(m, n)))
    spec = TuckerSpec((m,), (n,), (rank, rank))
    network = FORMAT.network((m, n), spec)
    assert set(network.factors) == {"left", "right"}
    assert network.params == rank * (m + n)
    svd = truncated_svd(weight, rank)
    factors = FORMAT.fit(weight, Metric(), spec)
    torch.testing.assert_close(
        factors["left"] @ factors["right"], svd.u * svd.s @ svd.vh, atol=1e-10, rtol=0
    )
    [error] = FORMAT.errors(weight, Metric(), [spec])
    assert error**2 * float(weight.square().sum()) == pytest.approx(svd.discarded, abs=1e-7)


def test_modes_of_full_rank_carry_no_factor(gaussian):
    weight = gaussian(6, 8)
    spec = TuckerSpec((2, 3), (8,), (2, 2, 4))
    factors = FORMAT.fit(weight, Metric(), spec)
    assert set(factors) == set(FORMAT.network((6, 8), spec).factors) == {"core", "mode1", "mode2"}
    assert factors["core"].shape == (2, 2, 4)
    full = TuckerSpec((2, 3), (8,), (2, 3, 6))
    assert set(FORMAT.network((6, 8), full).factors) == {"core", "mode2"}
    whole = TuckerSpec((6,), (2, 4), (6, 2, 4))
    assert torch.equal(FORMAT.fit(weight, Metric(), whole)["core"], weight.reshape(6, 2, 4))
    assert FORMAT.errors(weight, Metric(), [whole]) == [0.0]


@given(split=splits, tolerance=st.floats(0.01, 0.99), decay=st.floats(0, 2), seed=seeds)
def test_a_tolerance_is_met(split, tolerance, decay, seed, gaussian):
    out, inp = split
    weight = gaussian(math.prod(out), math.prod(inp), seed=seed)
    weight = weight * torch.exp(-decay * torch.arange(weight.shape[1]))
    options = {"out_split": out, "in_split": inp}
    [spec] = FORMAT.within(weight, Metric(), options, tolerance)
    # What the planner is told must hold as well, not only what HOOI reaches.
    assert FORMAT.errors(weight, Metric(), [spec])[0] <= tolerance + 1e-7
    assert error_of(weight, spec) ** 0.5 <= tolerance * float(weight.norm()) + 1e-7


def test_a_tolerance_gives_ranks_that_the_other_modes_support():
    # Each of two modes is nearly rank 1, their product not quite: the third alone would keep 2.
    tensor = torch.zeros(2, 2, 2, dtype=torch.float64)
    tensor[0, 0, 0], tensor[1, 1, 0], tensor[1, 0, 1] = 1.0, 0.3, 0.3
    options = {"out_split": (2, 2), "in_split": (2,)}
    for tolerance in (0.46, 0.5, 0.52, 0.6):
        [spec] = FORMAT.within(tensor.reshape(4, 2), Metric(), options, tolerance)
        assert FORMAT.network((4, 2), spec).params > 0
        assert error_of(tensor.reshape(4, 2), spec) ** 0.5 <= tolerance * float(tensor.norm())


def test_options_fix_the_spec():
    def specs(**options):
        return FORMAT.candidates((12, 8), options, Ceiling(200))

    assert {len(spec.ranks) for spec in specs()} == {3, 4}
    assert specs(out_split=(12,), in_split=(8,))[0].ranks == (8, 8)
    assert {spec.ranks for spec in specs(ranks=[2])} == {(2, 2, 2), (2, 2, 2, 2)}
    assert specs(ranks=[3, 3]) == [TuckerSpec((12,), (8,), (3, 3), gauge=True)]
    assert specs(ranks=[3, 3], gauge=False) == [TuckerSpec((12,), (8,), (3, 3))]
    assert {len(spec.out_split + spec.in_split) for spec in specs(ranks=[2, 2, 2])} == {3}
    assert specs(ranks=[2, 3, 2, 1]) == [TuckerSpec((3, 4), (2, 4), (2, 3, 2, 1), gauge=True)]


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": (2, 2, 2, 2, 2)},
        {"out_split": (3, 4), "ranks": (2, 2)},
        {"ranks": (4, 2)},
        {"ranks": (13, 13)},
    ],
)
def test_impossible_ranks_are_refused(options):
    with pytest.raises(RankError, match="ranks="):
        FORMAT.candidates((12, 8), options, Ceiling())


def uneven(gaussian, size, seed=0):
    x = gaussian(3 * size, size, seed=seed) * torch.exp(1.5 * gaussian(size, seed=seed + 1))
    return x.T @ x / len(x)


def under_data(gaussian, m, n):
    yield InputMoment(uneven(gaussian, n))
    yield Metric(Side(uneven(gaussian, m, seed=3)), Side(uneven(gaussian, n)))
    yield Elementwise(gaussian(m, n, seed=4).square())


@pytest.mark.parametrize(
    "spec",
    [
        TuckerSpec((3, 4), (8,), (2, 3, 5)),
        TuckerSpec((3, 4), (2, 4), (3, 3, 2, 2)),
        TuckerSpec((12,), (8,), (3, 3)),
    ],
)
def test_data_lower_the_error_and_the_report_is_an_upper_bound(spec, gaussian):
    weight = gaussian(12, 8)
    for metric in under_data(gaussian, 12, 8):
        factors = FORMAT.fit(weight, metric, spec)
        error = metric.relative(weight, FORMAT.reconstruct((12, 8), spec, factors))
        plain = FORMAT.reconstruct((12, 8), spec, FORMAT.fit(weight, Metric(), spec))
        assert error < 0.95 * metric.relative(weight, plain)
        assert error <= FORMAT.errors(weight, metric, [spec])[0] + 1e-9
        for name in set(factors) - {"core", "right"}:
            gram = factors[name].T @ factors[name]
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.4])
def test_a_tolerance_is_met_under_data(tolerance, gaussian):
    weight = gaussian(12, 8)
    for metric in under_data(gaussian, 12, 8):
        for spec in FORMAT.within(weight, metric, {}, tolerance):
            factors = FORMAT.fit(weight, metric, spec)
            rebuilt = FORMAT.reconstruct((12, 8), spec, factors)
            assert metric.relative(weight, rebuilt) <= tolerance
            assert FORMAT.errors(weight, metric, [spec])[0] <= tolerance


@pytest.mark.parametrize("in_split", [(8,), (2, 4)])
def test_the_largest_bond_is_stored_without_its_redundancy(in_split, gaussian):
    ranks = (5, *in_split) if len(in_split) > 1 else (5, 5)
    plain, fixed = (TuckerSpec((12,), in_split, ranks, gauge=g) for g in (False, True))
    network = FORMAT.network((12, 8), fixed)
    assert FORMAT.network((12, 8), plain).params - network.params == 25
    factors = FORMAT.fit(gaussian(12, 8), Metric(), fixed)
    again = expand(network, fix(network, factors))
    torch.testing.assert_close(
        FORMAT.reconstruct((12, 8), fixed, again), FORMAT.reconstruct((12, 8), fixed, factors)
    )


@pytest.mark.parametrize("splits", [((12,), (2, 4)), ((3, 4), (8,))])
def test_one_whole_mode_under_data_is_the_best_low_rank(splits, gaussian):
    weight, rows = gaussian(12, 8), gaussian(30, 12)
    metric = Metric(Side(rows.T @ rows), Side(torch.linspace(1, 2, 8)))
    whole = len(splits[0]) > 1
    spec = TuckerSpec(*splits, (3, 4, 5) if whole else (5, 2, 4), gauge=True)
    fitted = FORMAT.fit(weight, metric, spec)
    error = metric.relative(weight, FORMAT.reconstruct((12, 8), spec, fitted))
    left, right = metric.low_rank(weight, 5)
    assert error == pytest.approx(metric.relative(weight, left @ right), rel=1e-9)
    assert FORMAT.errors(weight, metric, [spec]) == [pytest.approx(error)]
