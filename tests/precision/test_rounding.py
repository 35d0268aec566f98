"""Rounding: within half a step, with feedback never worse, and equal to an independent GPTQ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.precision.grid import Precision
from tnlm.precision.rounding import (
    conditional_variances,
    nearest,
    squared_error,
    with_feedback,
)


def drawn(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    return weight, mixing @ mixing.T / columns


GRIDS = st.builds(Precision, st.integers(2, 8), st.sampled_from([None, 8, 16, 64]), st.booleans())


@given(GRIDS, st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31))
def test_feedback_is_never_worse_than_the_nearest_code(grid, rows, columns, seed):
    weight, moment = drawn(rows, columns, seed)
    plain = nearest(weight, grid, moment.diagonal(), torch.float32)
    fed = with_feedback(weight, moment, grid, torch.float32)
    assert squared_error(weight, fed, moment) <= squared_error(weight, plain, moment)
    assert bool(fed.values().isfinite().all())


@given(GRIDS, st.integers(0, 2**31))
def test_every_weight_is_at_the_nearest_code(grid, seed):
    weight, _ = drawn(4, 24, seed)
    stored = nearest(weight, grid, dtype=torch.float32)
    error = (stored.values() - weight).abs()
    for shift in (-1, 1):
        codes = (stored.codes.int() + shift).clamp(0, grid.levels - 1).to(torch.uint8)
        other = type(stored)(grid, codes, stored.scales, stored.zeros)
        assert bool((error <= (other.values() - weight).abs() + 1e-12).all())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_more_bits_lose_less(bits):
    weight, moment = drawn(8, 64, 0)
    errors = [
        squared_error(weight, with_feedback(weight, moment, Precision(b), torch.float32), moment)
        for b in (bits - 1, bits)
    ]
    assert errors[1] < 0.5 * errors[0]


def test_values_on_the_grid_are_exact():
    codes = torch.arange(-8, 8, dtype=torch.float64).repeat(2, 4)
    stored = nearest(0.25 * codes, Precision(4, 16), dtype=torch.float32)
    assert torch.equal(stored.values(), 0.25 * codes)


def test_zeros_are_stored_exactly():
    stored = nearest(torch.zeros(3, 16), Precision(4))
    assert torch.equal(stored.values(), torch.zeros(3, 16, dtype=torch.float64))


def test_scales_are_chosen_as_they_are_stored():
    weight, _ = drawn(4, 64, 1)
    stored = nearest(weight, Precision(8), dtype=torch.bfloat16)
    assert stored.scales.dtype is torch.bfloat16
    assert torch.equal(stored.values(), stored.values().float().double())


def reference(weight, moment, stored, damping=0.01):
    """GPTQ by its definition: the inverse moment loses each column in turn, by elimination."""
    grid, columns = stored.precision, weight.shape[1]
    scale = stored.scales.double().repeat_interleave(grid.width(columns), 1)[:, :columns]
    zero = grid.levels // 2
    mean = float(moment.diagonal().mean())
    inverse = torch.linalg.inv(moment + damping * mean * torch.eye(columns, dtype=moment.dtype))
    left, codes = weight.clone(), torch.empty_like(weight)
    for column in moment.diagonal().argsort(descending=True, stable=True).tolist():
        code = torch.round(left[:, column] / scale[:, column] + zero).clamp(0, grid.levels - 1)
        codes[:, column] = code
        error = left[:, column] - scale[:, column] * (code - zero)
        pivot = float(inverse[column, column])
        left -= torch.outer(error / pivot, inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / pivot
    return codes.to(torch.uint8)


@pytest.mark.parametrize("columns", [40, 130])
def test_feedback_equals_an_independent_gptq(columns):
    weight, moment = drawn(6, columns, 3)
    grid = Precision(4, 32)
    stored = with_feedback(weight, moment, grid, torch.float32)
    plain = nearest(weight, grid, moment.diagonal(), torch.float32)
    assert torch.equal(stored.scales, plain.scales)
    assert torch.equal(stored.codes, reference(weight, moment, plain))


def test_the_variance_of_a_column_given_later_ones():
    _, moment = drawn(1, 6, 5)
    order = moment.diagonal().argsort(descending=True)
    found = conditional_variances(moment, damping=0.0)
    for place, column in enumerate(order.tolist()):
        later = order[place + 1 :]
        block = moment[later][:, later]
        given_later = moment[column, column]
        if len(later):
            cross = moment[column, later]
            given_later = given_later - cross @ torch.linalg.solve(block, cross)
        assert float(found[column]) == pytest.approx(float(given_later), rel=1e-6)
