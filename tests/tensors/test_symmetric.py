"""Halves of symmetric matrices: what rounding changes, and sums that need no other half."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.tensors import symmetric
from tnlm.tensors.symmetric import add_outer, packed, unpacked

ROUNDING = {torch.float32: 2.0**-24, torch.int16: 1 / 65534}


@given(
    size=st.integers(1, 17),
    rank=st.integers(1, 20),
    spread=st.integers(0, 60),
    dtype=st.sampled_from(list(ROUNDING)),
    seed=st.integers(0, 50),
)
def test_the_weight_of_any_error_changes_within_the_bound(
    size, rank, spread, dtype, seed, gaussian
):
    scales = torch.logspace(-spread, spread, size, dtype=torch.float64)
    rows = gaussian(rank, size, seed=seed) * scales
    matrix = rows.T @ rows
    again = unpacked(*packed(matrix, dtype))
    assert torch.equal(again, again.T)
    assert torch.equal(again.diagonal(), matrix.diagonal())
    errors = gaussian(5, size, seed=seed + 100) / scales
    change = torch.einsum("ki,ij,kj->k", errors, again - matrix, errors).abs()
    bound = size * ROUNDING[dtype] * errors.square() @ matrix.diagonal()
    assert bool((change <= bound * (1 + 1e-6) + 1e-12 * errors.square() @ matrix.diagonal()).all())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [1, 4, 5])
def test_zeros_stay_zeros(size, dtype):
    matrix = torch.zeros(size, size).double()
    matrix[0, 0] = 2.0
    assert torch.equal(unpacked(*packed(matrix, dtype)), matrix)


def test_half_of_the_values_are_kept():
    half, diagonal = packed(torch.eye(100).double())
    assert half.numel() == 100 * 101 // 2
    assert len(diagonal) == 100


@given(size=st.integers(1, 12), columns=st.integers(1, 12))
def test_sums_of_parts_are_the_whole(size, columns, gaussian):
    rows = gaussian(9, size, seed=size).float()
    total = torch.zeros(size, size, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric, "COLUMNS", columns)
        add_outer(total, rows)
        add_outer(total, rows)
    wanted = 2 * (rows.T @ rows).double().tril()
    torch.testing.assert_close(total.tril(), wanted, rtol=1e-5, atol=1e-5)


def test_no_rows_add_nothing():
    total = torch.ones(3, 3, dtype=torch.float64)
    add_outer(total, torch.zeros(0, 3))
    assert torch.equal(total, torch.ones(3, 3).double())


@pytest.mark.parametrize("scale", [1e-15, 1e-20, 1e-30])
def test_products_too_small_for_float32_are_kept(scale, gaussian):
    rows = torch.cat([gaussian(9, 3, seed=0) * scale, gaussian(9, 2, seed=1)], 1).float()
    rows[:, 4] = 0.0
    total = torch.zeros(5, 5, dtype=torch.float64)
    add_outer(total, rows)
    wanted = (rows.double().T @ rows.double()).tril()
    bound = rows.double().norm(dim=0).outer(rows.double().norm(dim=0))
    assert bool(((total.tril() - wanted).abs() <= 1e-6 * bound).all())
