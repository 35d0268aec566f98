"""Products group by group are those of every row with the matrix of its expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.layers.grouped import EVERYONE, Groups

EXPERTS = 3
sorted_ids = st.lists(st.integers(0, EXPERTS), max_size=7).map(sorted)  # the last is no expert


def draws(ids, blocks=1):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(ids), blocks, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(EXPERTS, blocks, 5, 4, generator=generator, dtype=torch.float64)
    return Groups.of(torch.tensor(ids, dtype=torch.int64), EXPERTS), x, weights


def one_by_one(ids, x, weights):
    rows = [
        weights[e] @ row[..., None] if e < EXPERTS else 0 * weights[0] @ row[..., None]
        for e, row in zip(ids, x, strict=True)
    ]
    return torch.stack(rows)[..., 0] if rows else x.new_zeros(0, x.shape[1], 5)


@given(sorted_ids, st.integers(1, 3), st.booleans())
def test_every_row_meets_its_expert(ids, blocks, needs_grad):
    groups, x, weights = draws(ids, blocks)
    with torch.set_grad_enabled(needs_grad):
        torch.testing.assert_close(groups.product(x, weights), one_by_one(ids, x, weights))


@pytest.mark.parametrize("ids", [[0, 0, 1, 2], [1, 1], [0, 3, 3], []])
@pytest.mark.parametrize("blocks", [1, 2])
def test_gradients_are_those_of_the_products(ids, blocks):
    groups, x, weights = draws(ids, blocks)
    assert torch.autograd.gradcheck(groups.product, (x.requires_grad_(), weights.requires_grad_()))


@given(sorted_ids)
def test_rows_are_put_into_the_order_of_their_expert(ids):
    groups, x, _ = draws(ids)
    orders = torch.stack([torch.randperm(4) for _ in range(EXPERTS)])
    found = groups.reorder(x, orders)
    traced = x.gather(-1, orders[groups.ids].unsqueeze(1))
    whole = sum(expert < EXPERTS for expert in ids)
    assert torch.equal(found[:whole], traced[:whole])
    assert found.shape == x.shape


@given(sorted_ids, st.integers(1, 3))
def test_rows_that_stand_several_times_stay_in_their_groups(ids, count):
    groups, x, weights = draws(ids)
    many = x.repeat_interleave(count, 0)
    expected = groups.product(x, weights).repeat_interleave(count, 0)
    with torch.no_grad():
        torch.testing.assert_close(groups.times(count).product(many, weights), expected)


def test_the_operators_are_what_they_say():
    x, weights = torch.randn(5, 2, 4), torch.randn(3, 2, 6, 4)
    torch.library.opcheck(
        torch.ops.tnlm.grouped_product.default,
        (x.requires_grad_(), weights.requires_grad_(), torch.tensor([2, 2, 5])),
    )


@pytest.mark.parametrize("blocks", [1, 3])
def test_what_everyone_shares_is_one_matrix_for_all_rows(blocks):
    ids = [0, 1, 1, 2]
    groups, x, weights = draws(ids, blocks)
    same = weights[:1].expand(EXPERTS, -1, -1, -1)
    torch.testing.assert_close(EVERYONE.product(x, weights[:1]), groups.product(x, same))
    order = torch.randperm(4).unsqueeze(0)
    found = EVERYONE.times(2).reorder(x[:, :1], order)
    assert torch.equal(found, groups.reorder(x[:, :1], order.expand(EXPERTS, -1)))
