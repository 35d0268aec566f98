"""Experts that few tokens reach borrow statistics from the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.calibration.pooling import lend
from tnlm.calibration.store import Statistics

COLUMNS = 4


def store_of(counts):
    """Return statistics of experts, expert k of inputs of size k + 1."""
    store = Statistics(tokens=sum(counts))
    for number, count in enumerate(counts):
        if count:
            moment = (number + 1.0) * torch.eye(COLUMNS).double()
            tensors = {"moment": moment, "mean": moment[0], "count": torch.tensor(count)}
            name = f"e.{number}.gate"
            store.put(name, [name, f"e.{number}.up"], tensors)
    return store


def groups_of(counts):
    return [[f"e.{n}.{part}" for n in range(len(counts))] for part in ("gate", "up")]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any))
def test_what_is_lacking_is_the_mean_over_all(counts):
    store = store_of(counts)
    borrowed = lend(store, groups_of(counts))
    few = [n for n, count in enumerate(counts) if count < COLUMNS]
    assert borrowed == [f"e.{n}.{part}" for part in ("gate", "up") for n in few]
    mean = sum(c * (n + 1.0) for n, c in enumerate(counts)) / sum(counts)
    for number, count in enumerate(counts):
        own = min(count / COLUMNS, 1.0)
        for part in ("gate", "up"):
            name = f"e.{number}.{part}"
            found = float(store.tensor(name, "moment")[0, 0])
            assert found == pytest.approx(own * (number + 1) + (1 - own) * mean)
            assert store.count(name) == count


def test_an_expert_of_no_token_has_the_effect_of_one():
    store = Statistics(tokens=8)
    for name in ("a", "b"):
        store.put(name, [name], {"gradient": 4 * torch.eye(2).double()})
    assert lend(store, [["a", "b", "c"]]) == ["c"]
    assert torch.equal(store.tensor("c", "gradient"), torch.eye(2).double())
    assert torch.equal(store.tensor("a", "gradient"), 4 * torch.eye(2).double())


def test_a_group_that_nothing_reached_is_left():
    store = Statistics(tokens=8)
    assert lend(store, [["a", "b"]]) == []
    assert store.leaders == {}
