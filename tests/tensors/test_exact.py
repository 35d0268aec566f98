"""Sums over batches are the same in any order, and as exact as float32 products."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlm.tensors.exact import BITS, power_of_two, rounded, rounded_products


def batches(seed, count, spread):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-spread, spread, 12)
    for _ in range(count):
        level = 2.0 ** float(torch.randint(-5, 6, (), generator=generator))
        yield torch.randn(20, 12, generator=generator) * scale * level


def moment_of(part):
    bounds = power_of_two(part.norm(dim=0))
    return rounded_products(part.T @ part, bounds, bounds)


def total(parts, order):
    found = torch.zeros_like(parts[0], dtype=torch.float64)
    for index in order:
        found += parts[index]
    return found


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 8))
def test_sums_do_not_depend_on_the_order(seed, count, spread):
    rows = list(batches(seed, count, spread))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    moments = [moment_of(part) for part in rows]
    sizes = [part.abs().sum(0, dtype=torch.float64) for part in rows]
    sums = [part.sum(0, dtype=torch.float64) for part in rows]
    means = [rounded(one, size) for one, size in zip(sums, sizes, strict=True)]
    for parts in (moments, means):
        assert torch.equal(total(parts, order), total(parts, range(count)))


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 8), st.sampled_from([torch.float32, torch.float64]))
def test_rounding_stays_within_the_grid(seed, spread, dtype):
    part = next(batches(seed, 1, spread)).to(dtype)
    moment = part.T @ part
    roots = moment.diagonal().sqrt()
    near = 2.0 ** (1 - BITS) * torch.outer(roots, roots)  # half a step, of powers of two above
    found = moment_of(part)
    assert bool(((found - moment).abs() <= near).all())
    assert torch.equal(found, found.T)


def test_zeros_and_what_is_not_finite_stay():
    assert torch.equal(moment_of(torch.zeros(3, 2)), torch.zeros(2, 2).double())
    assert bool(rounded(torch.full((1,), torch.nan).double(), torch.ones(1)).isnan())
