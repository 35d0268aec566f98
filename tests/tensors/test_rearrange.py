from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.tensors.rearrange import divisor_pairs, rearrange, sample

sizes, seeds = st.integers(1, 5), st.integers(0, 20)
splits = st.tuples(sizes, sizes)


@given(out=splits, inp=splits, seed=seeds)
def test_a_kronecker_product_becomes_an_outer_product(out, inp, seed, gaussian):
    a, b = gaussian(out[0], inp[0], seed=seed), gaussian(out[1], inp[1], seed=seed + 1)
    rows = rearrange(torch.kron(a, b), out, inp)
    torch.testing.assert_close(rows, torch.outer(a.flatten(), b.flatten()))


def test_the_outer_factor_is_the_left_one(gaussian):
    a, b = gaussian(2, 3), gaussian(4, 5, seed=1)
    right_order = rearrange(torch.kron(a, b), (2, 4), (3, 5))
    wrong_order = rearrange(torch.kron(b, a), (2, 4), (3, 5))
    assert torch.linalg.matrix_rank(right_order) == 1
    assert torch.linalg.matrix_rank(wrong_order) > 1


@given(out=splits, inp=splits)
def test_every_entry_is_kept_once_and_every_row_is_a_block(out, inp):
    shape = out[0] * out[1], inp[0] * inp[1]
    weight = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    rows = rearrange(weight, out, inp)
    assert rows.shape == (out[0] * inp[0], out[1] * inp[1])
    assert sorted(rows.flatten().tolist()) == weight.flatten().tolist()
    blocks = [block for line in weight.split(out[1]) for block in line.split(inp[1], dim=1)]
    assert torch.equal(rows, torch.stack([block.flatten() for block in blocks]))


@given(out=splits, inp=splits, terms=st.integers(1, 3), seed=seeds)
def test_no_sum_of_products_beats_the_tail(out, inp, terms, seed, gaussian):
    weight = gaussian(out[0] * out[1], inp[0] * inp[1], seed=seed)
    tail = torch.linalg.svdvals(rearrange(weight, out, inp))[terms:].square().sum()
    # The best right factors for random left ones: a rival of the same size.
    lefts = gaussian(out[0] * inp[0], terms, seed=seed + 1)
    rights = torch.linalg.pinv(lefts) @ rearrange(weight, out, inp)
    rival = sum(
        torch.kron(left.reshape(out[0], inp[0]), right.reshape(out[1], inp[1]))
        for left, right in zip(lefts.T, rights, strict=True)
    )
    assert float((weight - rival).square().sum()) >= float(tail) - 1e-10


@given(out=splits, inp=splits, keep=st.integers(1, 30))
def test_a_sample_holds_whole_rows_or_columns(out, inp, keep):
    shape = out[0] * out[1], inp[0] * inp[1]
    weight = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    rows, chosen = rearrange(weight, out, inp), sample(weight, out, inp, keep)
    if rows.shape[0] < rows.shape[1]:
        rows, chosen = rows.T, chosen.T
    lines = [line.tolist() for line in rows]
    assert len(chosen) > 0
    assert all(line.tolist() in lines for line in chosen)
    assert len({line[0].item() for line in chosen}) == len(chosen)
    assert len(chosen) >= min(keep, len(rows)) / 2
    if keep >= len(rows):
        assert len(chosen) == len(rows)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (7, 2), (36, 9), (576, 21)])
def test_divisor_pairs_are_all_divisors(size, count):
    pairs = list(divisor_pairs(size))
    assert all(outer * inner == size for outer, inner in pairs)
    assert len(set(pairs)) == count
