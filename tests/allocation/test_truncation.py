from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnlm.allocation.base import Limits, Problem
from tnlm.allocation.truncation import ALLOCATION, MOST, shares
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.plans.plan import total
from tnlm.targets.matrix import MatrixTarget

losses = st.lists(st.floats(1.0001, 1e12), min_size=1, max_size=12)


@given(losses=losses, keep=st.floats(0.05, 0.999))
def test_the_type_keeps_its_budget_and_a_larger_loss_keeps_more(losses, keep):
    found = shares(losses, keep)
    assert sum(found) == pytest.approx(keep * len(losses))
    assert all(1 - max(MOST, 1 - keep) - 1e-9 <= share <= 1 for share in found)
    for loss, share in zip(losses, found, strict=True):
        for other, its in zip(losses, found, strict=True):
            assert share >= its - 1e-9 or loss < other


@given(losses=losses, keep=st.floats(0.5, 0.999))
def test_the_published_rule_holds_where_no_matrix_is_cut_to_nothing(losses, keep):
    inverse = [1 / math.log(loss) for loss in losses]
    lost = [len(losses) * (1 - keep) * g / sum(inverse) for g in inverse]
    if max(lost) <= MOST:
        assert shares(losses, keep) == pytest.approx([1 - part for part in lost])


def test_what_one_cannot_lose_the_others_lose():
    found = shares([1.0001, math.e, math.e**3], 0.5)
    assert found[0] == pytest.approx(0.01)
    assert (1 - found[1]) / (1 - found[2]) == pytest.approx(3)


@pytest.mark.parametrize("low", [1.0, 0.5, 0.0])
def test_losses_up_to_one_have_no_inverse_log_and_are_cut_evenly(low):
    assert shares([5.0, low, 9.0], 0.7) == [0.7] * 3


def model_of(gaussian, scales, shape=(24, 20)):
    model = nn.ModuleDict({"h": nn.ModuleList()})
    for index, scale in enumerate(scales):
        pair = {"q": nn.Linear(shape[1], shape[0], bias=False)}
        pair |= {"mlp": nn.ModuleDict({"q": nn.Linear(16, 16, bias=False)})}
        model["h"].append(nn.ModuleDict(pair))
        with torch.no_grad():
            pair["q"].weight.copy_(scale * gaussian(*shape, seed=index))
            pair["mlp"]["q"].weight.copy_(100 * gaussian(16, 16, seed=index + 40))
    return model


def problem_of(model, keep, metric=None, **limits):
    targets = [
        MatrixTarget(name, name, tuple(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    measure = metric or (lambda target: Metric())
    return Problem(
        model,
        targets,
        [get_format("low-rank")],
        measure,
        lambda target: 1.0,
        Limits(keep, **limits),
    )


def test_matrices_are_compared_with_those_of_their_own_type(gaussian):
    problem = problem_of(model_of(gaussian, [1, 10, 100]), 0.6)
    found = ALLOCATION.allocate(problem)
    assert [layer.name for layer in found] == [target.name for target in problem.targets]
    assert total(layer.after for layer in found).params <= 0.6 * 3 * (480 + 256)
    for shape in ((24, 20), (16, 16)):  # each type keeps the budget by itself
        same = [layer for layer in found if layer.shape == shape]
        kept = sum(layer.after.params for layer in same) / (3 * math.prod(shape))
        assert 0.5 < kept <= 0.6
    ranks = [layer.spec["rank"] for layer in found if layer.shape == (24, 20)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_the_loss_is_the_sum_of_the_singular_values_left_out(gaussian):
    model = model_of(gaussian, [1, 10])
    rows = Side(gaussian(20, seed=7).square() + 0.1)
    sides = {20: rows, 16: Side(torch.ones(16))}
    problem = problem_of(model, 0.6, lambda target: Metric(inputs=sides[target.shape[1]]))
    found = [layer for layer in ALLOCATION.allocate(problem) if layer.shape == (24, 20)]

    def largest(keep):
        budget = Ceiling(math.floor(keep * 480 + 1e-9))
        return get_format("low-rank").candidates((24, 20), {}, budget)[0].rank

    left = [
        float(
            torch.linalg.svdvals(block["q"].weight.detach().double() * rows.root)[
                largest(0.6) :
            ].sum()
        )
        for block in model["h"]
    ]
    expected = [largest(keep) for keep in shares(left, 0.6)]
    assert [layer.spec["rank"] for layer in found] == expected


def test_small_losses_are_cut_uniformly(gaussian):
    model = model_of(gaussian, [1e-6, 1e-7])
    found = [x for x in ALLOCATION.allocate(problem_of(model, 0.6)) if x.shape == (24, 20)]
    assert len({layer.spec["rank"] for layer in found}) == 1
