from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import ModelError, OptionError
from tnlm.tensors.linalg import energies, pivot_rows, rank_for, tails, truncated_svd

METHODS = ["exact", "gram"]
sizes, seeds = st.integers(1, 12), st.integers(0, 20)
both = pytest.mark.parametrize("method", METHODS)


@both
@given(m=sizes, n=sizes, part=st.floats(0, 1), seed=seeds)
def test_what_is_discarded_is_the_tail_of_the_spectrum(method, m, n, part, seed, gaussian):
    matrix = gaussian(m, n, seed=seed)
    rank = max(1, round(part * min(m, n)))
    svd = truncated_svd(matrix, rank, method=method)
    tail = torch.linalg.svdvals(matrix)[rank:].square().sum()
    assert (svd.u.shape, svd.s.shape, svd.vh.shape) == ((m, rank), (rank,), (rank, n))
    assert svd.discarded == pytest.approx(float(tail), abs=1e-10)
    error = matrix - svd.u * svd.s @ svd.vh
    assert float(error.square().sum()) == pytest.approx(svd.discarded, abs=1e-10)


@both
@given(m=sizes, n=sizes, part=st.floats(0, 1), seed=seeds, step=st.sampled_from([1e-3, 0.1, 10]))
def test_no_matrix_of_that_rank_is_nearer(method, m, n, part, seed, step, gaussian):
    matrix = gaussian(m, n, seed=seed)
    rank = max(1, round(part * min(m, n)))
    svd = truncated_svd(matrix, rank, method=method)
    # Rivals next to the optimum and far from it.
    left = svd.u * svd.s + step * gaussian(m, rank, seed=seed + 1)
    right = svd.vh + step * gaussian(rank, n, seed=seed + 2)
    fitted = torch.linalg.lstsq(left, matrix).solution
    for rival in (left @ right, left @ fitted):
        assert float((matrix - rival).square().sum()) >= svd.discarded - 1e-9


@both
@given(m=sizes, n=sizes, seed=seeds)
def test_vectors_are_orthonormal_with_a_fixed_sign(method, m, n, seed, gaussian):
    svd = truncated_svd(gaussian(m, n, seed=seed), method=method)
    eye = torch.eye(min(m, n), dtype=torch.float64)
    torch.testing.assert_close(svd.u.T @ svd.u, eye, atol=1e-10, rtol=0)
    torch.testing.assert_close(svd.vh @ svd.vh.T, eye, atol=1e-6, rtol=0)
    peaks = svd.u.gather(0, svd.u.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())
    assert bool((svd.s.diff() <= 1e-8).all())


@both
@given(m=sizes, n=sizes, rank=st.integers(0, 3), seed=seeds)
def test_rank_deficient_and_zero_matrices_are_rebuilt(method, m, n, rank, seed, gaussian):
    matrix = gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1)
    svd = truncated_svd(matrix, method=method)
    assert bool(svd.u.isfinite().all() and svd.vh.isfinite().all())
    torch.testing.assert_close(svd.u * svd.s @ svd.vh, matrix, atol=1e-10, rtol=0)
    kept = truncated_svd(matrix, min(max(rank, 1), m, n), method=method)
    assert kept.discarded <= 1e-10


@both
@given(m=sizes, n=sizes, tolerance=st.floats(0.001, 0.999), seed=seeds)
def test_a_tolerance_takes_the_smallest_rank_that_meets_it(method, m, n, tolerance, seed, gaussian):
    matrix = gaussian(m, n, seed=seed)
    rank = len(truncated_svd(matrix, tolerance=tolerance, method=method).s)
    allowed = (tolerance * float(matrix.norm())) ** 2
    assert truncated_svd(matrix, rank).discarded <= allowed + 1e-9
    assert rank == 1 or truncated_svd(matrix, rank - 1).discarded > allowed - 1e-9


def test_the_default_agrees_with_lapack_on_larger_matrices(gaussian):
    matrix = gaussian(60, 40)
    for rank in (1, 7, 40):
        auto = truncated_svd(matrix.float(), rank)
        exact = truncated_svd(matrix.float(), rank, method="exact")
        for one, other in zip(auto[:3], exact[:3], strict=True):
            torch.testing.assert_close(one, other, atol=1e-8, rtol=0)
        assert auto.u.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 for a 4x3 matrix; allowed: 1 to 3"),
        ({"rank": 4}, "rank=4"),
        ({"method": "fast"}, "method='fast'; allowed: auto, exact, gram"),
    ],
)
def test_bad_requests(options, message, gaussian):
    with pytest.raises(OptionError, match=message):
        truncated_svd(gaussian(4, 3), **options)


def test_tails_and_energies(gaussian):
    matrix = gaussian(5, 9)
    energy = energies(matrix @ matrix.T)
    torch.testing.assert_close(energy, torch.linalg.svdvals(matrix).square())
    assert tails(torch.tensor([3.0, 2.0, 1.0])).tolist() == [6.0, 3.0, 1.0, 0.0]
    # Rounding makes eigenvalues of a singular matrix negative; energies are not.
    low = gaussian(9, 2) @ gaussian(2, 9, seed=1)
    assert float(energies(low @ low.T).min()) >= 0


@pytest.mark.parametrize(
    ("tolerance", "rank"), [(1.0, 1), (0.7, 3), (0.5, 3), (0.49, 4), (1e-9, 4), (0.0, 4)]
)
def test_rank_for_allows_the_tolerance_itself(tolerance, rank):
    # Ranks 1 to 4 leave 3, 2, 1 and 0 of 4: relative errors 0.87, 0.71, 0.5 and 0.
    assert rank_for(torch.ones(4), tolerance) == rank
    assert rank_for(torch.zeros(4), tolerance) == 1


@given(m=st.integers(1, 30), part=st.floats(0, 1), seed=seeds, scale=st.floats(0, 3))
def test_pivot_rows_span_all_rows_with_coefficients_of_two(m, part, seed, scale, gaussian):
    rank = max(1, round(part * m))
    rows = gaussian(m, rank, seed=seed) * torch.exp(-scale * torch.arange(m))[:, None]
    check_pivots(torch.linalg.qr(rows)[0], 2.0)


@given(m=st.integers(2, 30), part=st.floats(0, 1), bound=st.sampled_from([1.01, 1.5, 4.0]))
def test_pivot_rows_keep_any_bound(m, part, bound, gaussian):
    check_pivots(torch.linalg.qr(gaussian(m, max(1, round(part * m))))[0], bound)


@pytest.mark.parametrize("rank", [12, 16])
def test_rows_are_swapped_where_elimination_alone_grows(rank):
    # Wilkinson's matrix: partial pivoting leaves a last row with coefficients of 2**(rank - 1).
    lower = torch.eye(rank) - torch.ones(rank, rank).tril(-1)
    basis = torch.linalg.qr(torch.cat([lower, -torch.ones(1, rank)]).double())[0]
    start = basis[pivot_rows(basis, bound=1e9)]
    assert float(torch.linalg.solve(start, basis, left=False).abs().max()) > 2
    check_pivots(basis, 2.0)


def check_pivots(basis: torch.Tensor, bound: float) -> None:
    rows = pivot_rows(basis, bound)
    assert len(set(rows.tolist())) == basis.shape[1]
    block = basis[rows]
    assert torch.linalg.cond(block) < 1e8
    coefficients = torch.linalg.solve(block, basis, left=False)
    assert float(coefficients.abs().max()) <= bound + 1e-8


@pytest.mark.parametrize("rank", [1, 3])
def test_pivot_rows_of_a_basis_with_zero_and_equal_rows(rank):
    eye = torch.eye(rank, dtype=torch.float64)
    basis = torch.cat([torch.zeros(2, rank), eye, eye]) / 2**0.5
    check_pivots(basis, 2.0)


def test_no_rows_are_chosen_from_a_basis_that_is_not_finite():
    with pytest.raises(ModelError, match="not finite"):
        pivot_rows(torch.full((4, 2), math.nan))
