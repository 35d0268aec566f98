from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions import kronecker, kronecker_screen
from tnlm.decompositions.als import als
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.kronecker import FORMAT, KroneckerSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.costs import macs
from tnlm.tensors.linalg import truncated_svd
from tnlm.tensors.rearrange import divisor_pairs, rearrange

seeds = st.integers(0, 20)
PLANTED = [((3, 4), (5, 2)), ((4, 6), (6, 4)), ((2, 15), (8, 3)), ((9, 2), (2, 9))]


def planted(gaussian, terms, out, inp, seed):
    lefts = gaussian(terms, out[0], inp[0], seed=seed)
    rights = gaussian(terms, out[1], inp[1], seed=seed + 1)
    return sum(torch.kron(a, b) for a, b in zip(lefts, rights, strict=True))


def best(weight, specs):
    errors = FORMAT.errors(weight, Metric(), specs)
    return min(zip(errors, specs, strict=True), key=lambda pair: pair[0])


@given(split=st.sampled_from(PLANTED), terms=st.integers(1, 2), seed=seeds)
def test_a_planted_sum_is_found_among_all_splits_and_recovered(split, terms, seed, gaussian):
    out, inp = split
    weight = planted(gaussian, terms, out, inp, seed)
    # At half the parameters no split is exact for every matrix.
    specs = FORMAT.candidates(tuple(weight.shape), {"terms": terms}, Ceiling(weight.numel() / 2))
    assert len(specs) > 5
    error, found = best(weight, specs)
    assert (found.out_split, found.in_split, found.terms) == (out, inp, terms)
    assert error < 1e-7
    rebuilt = FORMAT.reconstruct(tuple(weight.shape), found, FORMAT.fit(weight, Metric(), found))
    torch.testing.assert_close(rebuilt, weight, atol=1e-10, rtol=0)


def test_a_planted_sum_is_found_on_a_sample(gaussian, monkeypatch):
    # As for a large matrix: 2304 entries, of which each split is screened on some 300.
    monkeypatch.setattr(kronecker_screen, "SCREEN_ENTRIES", 300)
    weight = planted(gaussian, 2, (6, 8), (4, 12), seed=0) + 0.1 * gaussian(48, 48, seed=2)
    specs = FORMAT.candidates((48, 48), {"terms": 2}, Ceiling(weight.numel() / 2))
    assert best(weight, specs)[1].out_split == (6, 8)


@given(
    rows=st.sampled_from([12, 16, 18, 20]),
    columns=st.sampled_from([12, 16, 24]),
    keep=st.sampled_from([0.3, 0.5, 0.8]),
    seed=seeds,
)
def test_screening_misses_nothing_on_small_matrices(rows, columns, keep, seed, gaussian):
    weight = gaussian(rows, columns, seed=seed)
    specs = FORMAT.candidates((rows, columns), {}, Ceiling(keep * rows * columns))
    exhaustive = [FORMAT.errors(weight, Metric(), [spec])[0] for spec in specs]
    screened = FORMAT.errors(weight, Metric(), specs)
    finite = [error for error in screened if error < math.inf]
    assert min(len(specs), kronecker.FINALISTS) <= len(finite)
    assert min(screened) <= min(exhaustive) * 1.001
    pairs = zip(screened, exhaustive, strict=True)
    assert all(one == other for one, other in pairs if one < math.inf)


@given(
    shape=st.sampled_from([(12, 18), (24, 24), (40, 12)]),
    keep=st.sampled_from([0.3, 0.6, 0.9]),
    decay=st.sampled_from([0.0, 2.0, 6.0]),
    count=st.integers(1, 6),
    seed=seeds,
)
def test_thin_splits_are_left_out_only_where_they_cannot_be_chosen(
    shape, keep, decay, count, seed, gaussian
):
    scales = torch.logspace(0, -decay, shape[1], dtype=torch.float64)
    weight = gaussian(*shape, seed=seed) * scales
    specs = FORMAT.candidates(shape, {}, Ceiling(keep * weight.numel()))
    chosen = kronecker._best(kronecker_screen.Spectra(weight), specs, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kronecker_screen.Spectra, "floor", lambda *_: 0.0)
        assert kronecker._best(kronecker_screen.Spectra(weight), specs, count) == chosen


@given(m=st.integers(2, 10), n=st.integers(2, 10), part=st.floats(0, 1), seed=seeds)
def test_outer_rows_and_inner_columns_make_it_the_truncated_svd(m, n, part, seed, gaussian):
    weight, terms = gaussian(m, n, seed=seed), max(1, round(part * min(m, n)))
    spec = KroneckerSpec(terms, (m, 1), (1, n))
    svd = truncated_svd(weight, terms)
    rebuilt = FORMAT.reconstruct((m, n), spec, FORMAT.fit(weight, Metric(), spec))
    torch.testing.assert_close(rebuilt, svd.u * svd.s @ svd.vh, atol=1e-9, rtol=0)
    [error] = FORMAT.errors(weight, Metric(), [spec])
    assert error == pytest.approx(svd.discarded**0.5 / float(weight.norm()), abs=1e-7)
    assert FORMAT.network((m, n), spec).params == terms * (m + n - terms)


@given(
    out=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    inp=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    part=st.floats(0, 1),
    seed=seeds,
)
def test_the_error_is_the_tail_of_the_rearranged_matrix(out, inp, part, seed, gaussian):
    shape = math.prod(out), math.prod(inp)
    weight = gaussian(*shape, seed=seed)
    terms = max(1, round(part * min(out[0] * inp[0], out[1] * inp[1])))
    spec = KroneckerSpec(terms, out, inp)
    factors = FORMAT.fit(weight, Metric(), spec)
    error = weight - FORMAT.reconstruct(shape, spec, factors)
    values = torch.linalg.svdvals(rearrange(weight, out, inp))
    assert float(error.square().sum()) == pytest.approx(
        float(values[terms:].square().sum()), abs=1e-9
    )
    # Both sides carry the root of sigma, so that neither overflows a narrow dtype.
    for factor in factors.values():
        torch.testing.assert_close(
            factor.flatten(1).norm(dim=1), values[:terms].sqrt(), atol=1e-8, rtol=0
        )


@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    keep=st.floats(0.1, 1.0),
    speed=st.floats(0.2, 2.0),
    gauge=st.booleans(),
)
def test_one_more_term_would_break_the_budget(rows, columns, keep, speed, gauge):
    shape, total = (rows, columns), rows * columns
    budget = Ceiling(keep * total, speed * total)
    specs = FORMAT.candidates(shape, {"gauge": gauge}, budget)
    found = {(spec.out_split, spec.in_split): spec for spec in specs}
    for out in divisor_pairs(rows):
        for inp in divisor_pairs(columns):
            terms = found[out, inp].terms if (out, inp) in found else 0
            more = KroneckerSpec(terms + 1, out, inp, gauge)
            if more.terms <= min(out[0] * inp[0], out[1] * inp[1]):
                assert not budget.allows(FORMAT.network(shape, more))


def test_options_fix_fields_of_the_spec():
    options = {"terms": 3, "out_split": [4, 3], "in_split": (2, 4), "gauge": False}
    specs = FORMAT.candidates((12, 8), options, Ceiling())
    assert specs == [KroneckerSpec(3, (4, 3), (2, 4), gauge=False)]
    assert FORMAT.candidates((12, 8), options, Ceiling(params=10)) == []


def test_the_default_is_never_slower_than_dense():
    for spec in FORMAT.candidates((64, 48), {"terms": 4}, Ceiling(0.8 * 64 * 48, 64 * 48)):
        assert macs(FORMAT.network((64, 48), spec)) <= 64 * 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terms": 25}, "terms=25; a 6x4 matrix has at most 4 for any allowed split"),
        ({"terms": 5, "out_split": (2, 3), "in_split": (2, 2)}, "has at most 4"),
        ({"out_split": (4, 2)}, "out_split=\\(4, 2\\) multiplies to 8, not to 6"),
        ({"in_split": (4,)}, "in_split"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(RankError, match=message):
        FORMAT.candidates((6, 4), options, Ceiling())


def test_more_terms_than_a_split_has_are_refused():
    with pytest.raises(RankError, match="terms=7, but a 6x4 matrix with"):
        FORMAT.network((6, 4), KroneckerSpec(7, (2, 3), (2, 2)))


def moment(gaussian, size, seed=0):
    x = gaussian(3 * size, size, seed=seed) * torch.exp(gaussian(size, seed=seed + 1))
    return x.T @ x / len(x)


def rebuilt(weight, metric, spec):
    factors = FORMAT.fit(weight, metric, spec)
    return FORMAT.reconstruct(tuple(weight.shape), spec, factors)


@given(terms=st.integers(1, 4), two_sided=st.booleans(), seed=seeds)
def test_under_a_kronecker_product_the_whitened_start_is_optimal(terms, two_sided, seed, gaussian):
    weight, spec = gaussian(12, 20, seed=seed), KroneckerSpec(terms, (3, 4), (5, 4))
    inputs = torch.kron(moment(gaussian, 5, seed), moment(gaussian, 4, seed + 2))
    outputs = torch.kron(moment(gaussian, 3, seed + 4), moment(gaussian, 4, seed + 6))
    metric = Metric(Side(outputs) if two_sided else None, Side(inputs))
    factors = FORMAT.fit(weight, metric, spec)
    error = metric.relative(weight, FORMAT.reconstruct((12, 20), spec, factors))
    # The tail of the whitened matrix is a lower bound here, and it is reached.
    assert FORMAT.errors(weight, metric, [spec])[0] == pytest.approx(error, abs=1e-8)
    network = FORMAT.network((12, 20), spec)
    objective = als(network, weight, metric, factors, sweeps=5, stall=0.0).objective
    assert objective[-1] == pytest.approx(objective[0], rel=1e-8)


def test_data_pay_where_inputs_are_uneven(gaussian):
    weight, scales = gaussian(24, 16), torch.logspace(0, -3, 16, dtype=torch.float64)
    metric = InputMoment(moment(gaussian, 16) * torch.outer(scales, scales))
    spec = KroneckerSpec(5, (6, 4), (4, 4))
    errors = [metric.relative(weight, rebuilt(weight, m, spec)) for m in (Metric(), metric)]
    assert errors[1] < 0.5 * errors[0]


def test_terms_stay_orthogonal_and_balanced_under_data(gaussian):
    weight, spec = gaussian(12, 8), KroneckerSpec(3, (3, 4), (4, 2))
    factors = FORMAT.fit(weight, InputMoment(moment(gaussian, 8)), spec)
    grams = [factor.flatten(1) @ factor.flatten(1).T for factor in factors.values()]
    torch.testing.assert_close(grams[0], torch.diag(grams[0].diagonal()), atol=1e-9, rtol=0)
    torch.testing.assert_close(grams[0], grams[1], atol=1e-9, rtol=0)


def test_under_data_screening_finds_the_best_split(gaussian):
    metric = Metric(Side(moment(gaussian, 16)), Side(moment(gaussian, 24, seed=3)))
    weight = gaussian(16, 24, seed=5)
    specs = FORMAT.candidates((16, 24), {}, Ceiling(0.5 * weight.numel()))
    exhaustive = [FORMAT.errors(weight, metric, [spec])[0] for spec in specs]
    screened = FORMAT.errors(weight, metric, specs)
    assert len(specs) > kronecker.FINALISTS
    assert min(screened) == min(exhaustive)
    assert sum(error < math.inf for error in screened) < len(specs)


@pytest.mark.parametrize("tolerance", [0.1, 0.4])
def test_a_tolerance_is_met_under_data(tolerance, gaussian):
    weight = gaussian(12, 8)
    for metric in (InputMoment(moment(gaussian, 8)), Elementwise(gaussian(12, 8).square())):
        specs = FORMAT.within(weight, metric, {}, tolerance)
        assert kronecker.FINALISTS <= len(specs) <= 2 * kronecker.FINALISTS
        assert any(macs(FORMAT.network((12, 8), spec)) <= 96 for spec in specs) or tolerance < 0.2
        for spec in specs:
            assert metric.relative(weight, rebuilt(weight, metric, spec)) <= tolerance
