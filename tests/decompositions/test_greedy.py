"""The greedy order of variables: every step takes the best, whenever the moments are updated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.greedy import greedy_order

SIZE, OUT = 14, 4


def plain(moment, weighed, batch, least):
    """The same order, with the moment of all variables updated at every step."""
    rest, wanted, taken, left = moment.clone(), moment @ weighed, [], []
    while len(taken) < least:
        gain = wanted.square().sum(1) / rest.diagonal().clamp_min(1e-300)
        gain[taken] = -1.0
        best = gain.topk(min(batch, SIZE - len(taken))).indices
        solved = torch.linalg.solve(rest[best][:, best], torch.cat([rest[best], wanted[best]], 1))
        columns = rest[:, best].clone()
        wanted = wanted - columns @ solved[:, SIZE:]
        rest = rest - columns @ solved[:, :SIZE]
        taken += best.tolist()
        left.append((len(taken), float((weighed * (rest @ weighed)).sum())))
    return taken, left


@given(
    seed=st.integers(0, 20),
    batch=st.integers(1, 5),
    panel=st.integers(1, 9),
    least=st.integers(1, SIZE),
)
def test_panels_change_nothing(seed, batch, panel, least, gaussian):
    inputs = gaussian(3 * SIZE, SIZE, seed=seed)
    moment, weighed = inputs.T @ inputs, gaussian(SIZE, OUT, seed=seed + 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tnlm.decompositions.greedy.PANEL", panel)
        taken, path = greedy_order(moment, weighed, batch, least)
    wanted, left = plain(moment, weighed, batch, least)
    assert taken.tolist() == wanted
    assert path[0] == (0, pytest.approx(float((weighed * (moment @ weighed)).sum())))
    assert [count for count, _ in path[1:]] == [count for count, _ in left]
    close = pytest.approx([value for _, value in left], rel=1e-6, abs=1e-6 * path[0][1])
    assert [value for _, value in path[1:]] == close


def test_copies_are_taken_last():
    moment = torch.ones(4, 4).double() + torch.diag(torch.tensor([0.0, 0.0, 1.0, 0.0])).double()
    taken, path = greedy_order(moment, torch.ones(4, 1).double(), 1, 4)
    assert sorted(taken.tolist()) == [0, 1, 2, 3]
    assert path[2][1] == pytest.approx(0.0, abs=1e-8)
