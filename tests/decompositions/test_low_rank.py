from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.low_rank import FORMAT, LowRankSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.gauge import expand, fix
from tnlm.tensors.linalg import truncated_svd

sizes, seeds, parts = st.integers(1, 10), st.integers(0, 20), st.floats(0, 1)
tokens = st.sampled_from([1, 2, 5, 40])


def rank_of(m, n, part):
    return max(1, round(part * min(m, n)))


def fitted(weight, metric, rank):
    factors = FORMAT.fit(weight, metric, LowRankSpec(rank))
    return factors["left"] @ factors["right"]


def moment(x, damping=1e-6):
    return InputMoment(x.T @ x / len(x), damping)


@given(m=sizes, n=sizes, part=parts, count=tokens, seed=seeds)
def test_the_error_is_the_tail_of_the_whitened_spectrum(m, n, part, count, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    metric = moment(gaussian(count, n, seed=seed + 1))
    values = torch.linalg.svdvals(metric.whiten(weight))
    error = metric.norm(weight - fitted(weight, metric, rank))
    scale = float(values.norm())
    assert error == pytest.approx(float(values[rank:].norm()), abs=1e-7 * scale)
    [reported] = FORMAT.errors(weight, metric, [LowRankSpec(rank)])
    assert reported * scale == pytest.approx(error, abs=1e-7 * scale)


@given(m=sizes, n=sizes, part=parts, seed=seeds)
def test_it_is_the_best_projection_of_the_outputs(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    x = gaussian(60, n, seed=seed + 1) * torch.logspace(0, -1, n, dtype=torch.float64)
    # The optimum stated on data: keep the leading principal components of the outputs.
    outputs = x @ weight.T
    directions = torch.linalg.svd(outputs)[2][:rank]
    expected = directions.T @ directions @ weight
    torch.testing.assert_close(
        fitted(weight, moment(x, damping=0.0), rank), expected, atol=1e-7, rtol=0
    )


@given(m=sizes, n=sizes, part=parts, count=tokens, seed=seeds)
def test_it_is_never_worse_than_plain_svd_in_the_metric(m, n, part, count, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    x = gaussian(count, n, seed=seed + 1) * torch.logspace(0, -2, n, dtype=torch.float64)
    metric, plain = moment(x), fitted(weight, Metric(), rank)
    whitened = fitted(weight, metric, rank)
    scale = metric.norm(weight)
    assert metric.norm(weight - whitened) <= metric.norm(weight - plain) + 1e-9 * scale
    assert Metric().norm(weight - plain) <= Metric().norm(weight - whitened) + 1e-9


def test_whitening_pays_where_inputs_are_uneven(gaussian):
    weight, scales = gaussian(20, 16), torch.logspace(0, -3, 16, dtype=torch.float64)
    metric = moment(gaussian(200, 16, seed=1) * scales)
    plain, whitened = (fitted(weight, m, 4) for m in (Metric(), metric))
    assert metric.relative(weight, whitened) < 0.5 * metric.relative(weight, plain)


@given(m=sizes, n=sizes, part=parts, seed=seeds)
def test_under_the_identity_it_is_the_truncated_svd(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    svd = truncated_svd(weight, rank)
    torch.testing.assert_close(
        fitted(weight, Metric(), rank), svd.u * svd.s @ svd.vh, atol=1e-8, rtol=0
    )


@given(m=sizes, n=sizes, count=tokens, seed=seeds, damping=st.sampled_from([0.0, 1e-6]))
def test_fewer_tokens_than_columns_do_no_harm(m, n, count, seed, damping, gaussian):
    weight, x = gaussian(m, n, seed=seed), gaussian(count, n, seed=seed + 1)
    rank = min(count, m, n)
    approximation = fitted(weight, moment(x, damping), rank)
    assert bool(approximation.isfinite().all())
    # The outputs seen span no more than this rank.
    outputs = x @ weight.T
    error = float((outputs - x @ approximation.T).norm())
    assert error <= (1e-7 if damping == 0 else 1e-2) * float(outputs.norm())


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_inputs_that_are_all_zero_count_as_unknown(shape, damping, gaussian):
    weight, n = gaussian(*shape), shape[1]
    metric = InputMoment(torch.zeros(n, n), damping)
    torch.testing.assert_close(fitted(weight, metric, 2), fitted(weight, Metric(), 2))
    torch.testing.assert_close(fitted(weight, metric, 4), weight)
    assert FORMAT.errors(torch.zeros(shape), metric, [LowRankSpec(2)]) == [0.0]


@given(m=sizes, n=sizes, part=parts, count=tokens, seed=seeds)
def test_gauge_fixed_equals_ungauged(m, n, part, count, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    metric = moment(gaussian(count, n, seed=seed + 1))
    plain, gauged = (LowRankSpec(rank, gauge) for gauge in (False, True))
    network = FORMAT.network((m, n), gauged)
    factors = FORMAT.fit(weight, metric, gauged)
    rebuilt = FORMAT.reconstruct((m, n), gauged, expand(network, fix(network, factors)))
    expected = FORMAT.reconstruct((m, n), plain, FORMAT.fit(weight, metric, plain))
    torch.testing.assert_close(rebuilt, expected, atol=1e-10, rtol=0)
    assert network.params == rank * (m + n - rank) <= m * n
    assert FORMAT.network((m, n), plain).params == rank * (m + n)


@given(m=st.integers(1, 30), n=st.integers(1, 30), keep=st.floats(0.05, 1), gauge=st.booleans())
def test_one_rank_more_would_break_the_budget(m, n, keep, gauge):
    budget = Ceiling(keep * m * n, m * n)
    specs = FORMAT.candidates((m, n), {"gauge": gauge}, budget)
    rank = specs[0].rank if specs else 0
    if rank < min(m, n):
        assert not budget.allows(FORMAT.network((m, n), LowRankSpec(rank + 1, gauge)))
    assert len(specs) == (rank > 0)


@given(m=sizes, n=sizes, tolerance=st.floats(0.01, 0.99), count=tokens, seed=seeds)
def test_a_tolerance_takes_the_smallest_rank(m, n, tolerance, count, seed, gaussian):
    weight, metric = gaussian(m, n, seed=seed), moment(gaussian(count, n, seed=seed + 1))
    [spec] = FORMAT.within(weight, metric, {"gauge": False}, tolerance)
    assert not spec.gauge
    assert metric.relative(weight, fitted(weight, metric, spec.rank)) <= tolerance + 1e-7
    if spec.rank > 1:
        smaller = fitted(weight, metric, spec.rank - 1)
        assert metric.relative(weight, smaller) > tolerance - 1e-7


def test_a_rank_that_is_asked_for_is_taken_or_refused():
    assert FORMAT.candidates((6, 4), {"rank": 3}, Ceiling()) == [LowRankSpec(3)]
    assert FORMAT.candidates((6, 4), {"rank": 3}, Ceiling(params=20)) == []
    with pytest.raises(RankError, match="rank=5; a 6x4 matrix allows 1 to 4"):
        FORMAT.candidates((6, 4), {"rank": 5}, Ceiling())


@given(m=sizes, n=sizes, part=parts, seed=seeds)
def test_even_weights_of_entries_give_the_truncated_svd(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    svd = truncated_svd(weight, rank)
    even = Elementwise(torch.full((m, n), 3.0))
    torch.testing.assert_close(
        fitted(weight, even, rank), svd.u * svd.s @ svd.vh, atol=1e-8, rtol=0
    )


@given(m=sizes, n=sizes, part=parts, seed=seeds)
def test_weights_of_rows_give_the_svd_of_the_scaled_rows(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    rows = torch.exp(gaussian(m, seed=seed + 1))
    svd = truncated_svd(rows.sqrt()[:, None] * weight, rank)
    expected = (svd.u * svd.s @ svd.vh) / rows.sqrt()[:, None]
    for metric in (Metric(outputs=Side(rows)), Elementwise(rows[:, None].expand(m, n))):
        torch.testing.assert_close(fitted(weight, metric, rank), expected, atol=1e-7, rtol=0)


@given(m=sizes, n=sizes, part=parts, seed=seeds)
def test_weights_of_entries_are_never_worse_than_fwsvd(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    metric = Elementwise(gaussian(m, n, seed=seed + 1).square())
    error = metric.relative(weight, fitted(weight, metric, rank))
    rows, columns = (
        Metric(outputs=Side(metric.weights.mean(1))),
        Metric(inputs=Side(metric.weights.mean(0))),
    )
    for other in (rows, columns, Metric(), metric.start()):
        assert error <= metric.relative(weight, fitted(weight, other, rank)) + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_weights_of_entries_near_to_weights_of_columns_are_never_worse_than_fwsvd(seed, gaussian):
    weight = gaussian(6, 5, seed=seed)
    # An importance of inputs, which are the columns here, but for a little.
    weights = gaussian(5, seed=seed + 1) ** 4 * (1 + 0.3 * gaussian(6, 5, seed=seed + 2).abs())
    metric = Elementwise(weights)
    columns = Metric(inputs=Side(metric.weights.mean(0)))
    for rank in (1, 2, 3):
        error = metric.relative(weight, fitted(weight, metric, rank))
        assert error <= metric.relative(weight, fitted(weight, columns, rank)) * (1 + 1e-9)


def test_weights_of_entries_pay_where_they_are_uneven(gaussian):
    weight = gaussian(20, 16)
    metric = Elementwise((gaussian(20, 16, seed=1) > 0.8).double(), floor=1e-4)
    errors = [metric.relative(weight, fitted(weight, m, 4)) for m in (metric.start(), metric)]
    assert errors[1] < 0.7 * errors[0]


@given(tolerance=st.floats(0.01, 0.99), seed=seeds)
def test_a_tolerance_is_met_under_weights_of_entries(tolerance, seed, gaussian):
    weight = gaussian(9, 7, seed=seed)
    metric = Elementwise(gaussian(9, 7, seed=seed + 1).square())
    [spec] = FORMAT.within(weight, metric, {}, tolerance)
    assert metric.relative(weight, fitted(weight, metric, spec.rank)) <= tolerance


@given(m=sizes, n=sizes, part=parts, seed=seeds)
def test_two_sides_are_the_svd_of_the_matrix_whitened_on_both(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), rank_of(m, n, part)
    sides = [gaussian(30, size, seed=seed + size) for size in (m, n)]
    metric = Metric(*(Side(x.T @ x / 30) for x in sides))
    tail = torch.linalg.svdvals(metric.whiten(weight))[rank:].norm()
    error = metric.norm(weight - fitted(weight, metric, rank))
    assert error == pytest.approx(float(tail), abs=1e-7 * metric.norm(weight))
