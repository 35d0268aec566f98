from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import CalibrationError
from tnlm.metrics.sides import Side

sizes, seeds = st.integers(1, 9), st.integers(0, 20)
dampings = st.sampled_from([0.0, 1e-6, 0.3, 1.0])
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def moment(x):
    return x.T @ x / len(x)


@given(n=sizes, tokens=st.sampled_from([1, 3, 30]), damping=dampings, seed=seeds)
def test_apply_is_the_form_and_scale_and_back_its_root(n, tokens, damping, seed, gaussian):
    side = Side(moment(gaussian(tokens, n, seed=seed)), damping)
    rows = gaussian(4, n, seed=seed + 1)
    close(side.apply(rows), rows @ side.values)
    close(side.back(side.scale(rows)), side.apply(rows), rtol=1e-7, atol=1e-9)
    close(side.scale(rows), rows @ side.root)
    close(side.root @ side.root.T, side.values, rtol=1e-7, atol=1e-9)
    assert side.inner(rows.T @ rows) == pytest.approx(float(side.scale(rows).square().sum()))


@given(n=sizes, damping=dampings, seed=seeds)
def test_a_diagonal_is_the_full_matrix_it_stands_for(n, damping, seed, gaussian):
    weights, rows = gaussian(n, seed=seed).square() + 0.1, gaussian(3, n, seed=seed + 1)
    thin, full = Side(weights, damping), Side(weights.diag(), damping)
    assert thin.is_diagonal
    assert not full.is_diagonal
    assert thin.mean == pytest.approx(full.mean)
    close(thin.values.diag(), full.values)
    close(thin.root.diag(), full.root)
    for name in ("apply", "scale", "back", "unscale"):
        close(getattr(thin, name)(rows), getattr(full, name)(rows))


@given(n=sizes, damping=dampings, seed=seeds)
def test_damping_moves_towards_the_mean_and_keeps_it(n, damping, seed, gaussian):
    given_ = moment(gaussian(n + 3, n, seed=seed))
    mean = float(given_.diagonal().mean())
    side = Side(given_, damping)
    close(side.values, (1 - damping) * given_ + damping * mean * torch.eye(n).double())
    assert side.mean == pytest.approx(mean)


@given(n=sizes, seed=seeds)
def test_unscale_undoes_scale(n, seed, gaussian):
    side, rows = Side(moment(gaussian(2 * n + 5, n, seed=seed)), 1e-3), gaussian(3, n, seed=seed)
    close(side.unscale(side.scale(rows)), rows)
    close(side.scale(side.unscale(rows)), rows)


@given(n=st.integers(2, 9), seen=st.integers(1, 8), seed=seeds)
def test_what_a_singular_form_never_saw_stays_out(n, seen, seed, gaussian):
    basis = torch.linalg.qr(gaussian(n, n, seed=seed))[0]
    seen = min(seen, n - 1)
    inside, outside = basis[:, :seen], basis[:, seen:]
    side = Side(inside @ inside.T)
    rows = gaussian(3, n, seed=seed + 1)
    # An inverse of rounding errors would be 1e8 here.
    close(side.unscale(rows) @ outside, torch.zeros(3, n - seen).double(), atol=1e-6)
    close(side.unscale(side.scale(rows)), rows @ inside @ inside.T, atol=1e-6)
    thin = Side(torch.tensor([4.0] * seen + [0.0] * (n - seen)))
    close(thin.unscale(rows)[:, seen:], torch.zeros(3, n - seen).double())
    close(thin.unscale(rows)[:, :seen], rows[:, :seen] / 2)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(4,), (4, 4)])
def test_nothing_seen_is_the_same_everywhere(shape, damping, gaussian):
    side, rows = Side(torch.zeros(shape), damping), gaussian(3, 4)
    for name in ("apply", "scale", "back", "unscale"):
        close(getattr(side, name)(rows), rows)
    assert side.mean == 1.0


def test_the_values_given_are_left_alone_and_kept_in_float64():
    given_ = torch.eye(3, dtype=torch.float32)
    assert Side(given_, 0.5).values.dtype == torch.float64
    assert torch.equal(given_, torch.eye(3))
    double = 2 * torch.eye(3, dtype=torch.float64)
    double[0, 0] = 8.0
    kept = double.clone()
    Side(double, 0.5)
    assert torch.equal(double, kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_values_must_be_finite(shape, bad):
    with pytest.raises(CalibrationError, match="not finite"):
        Side(torch.full(shape, bad))


splits = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(split=splits, seed=seeds, diagonal=st.booleans())
def test_modes_give_a_kronecker_product_back(split, seed, diagonal, gaussian):
    parts = [
        gaussian(n, seed=seed + k).square() + 0.1
        if diagonal
        else moment(gaussian(n + 2, n, seed=seed + k))
        for k, n in enumerate(split)
    ]
    side = Side(functools.reduce(torch.kron, parts))
    modes = side.modes(split)
    assert [len(mode.values) for mode in modes] == split
    close(functools.reduce(torch.kron, [mode.values for mode in modes]), side.values)
    for mode in modes[1:]:  # the first carries the scale
        assert mode.mean == pytest.approx(1.0)
    assert modes[0].mean == pytest.approx(side.mean)


@given(split=splits, seed=seeds)
def test_modes_are_partial_means(split, seed, gaussian):
    size = 1
    for n in split:
        size *= n
    side = Side(moment(gaussian(size + 3, size, seed=seed)))
    first, left = side.modes(split)[0], size // split[0]
    blocks = side.values.reshape(split[0], left, split[0], left)
    close(first.values, torch.einsum("ikjk->ij", blocks) / left)


def test_modes_of_nothing_are_even():
    for shape in ((6,), (6, 6)):
        for mode in Side(torch.zeros(shape)).modes((2, 3)):
            values = mode.values if mode.is_diagonal else mode.values.diagonal()
            close(values, torch.ones_like(values))


@given(n=sizes, tokens=st.sampled_from([1, 3, 30]), seed=seeds)
def test_only_what_damping_makes_definite_has_a_triangular_root(n, tokens, seed, gaussian):
    given_, rows = moment(gaussian(tokens, n, seed=seed)), gaussian(2, 3, n, seed=seed + 1)
    damped, bare = Side(given_, 1e-3), Side(given_)
    close(damped.root, damped.root.tril())
    close(bare.root, bare.root.T)
    close(damped.unscale(damped.scale(rows)), rows)
