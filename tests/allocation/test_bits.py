"""One budget of bytes: bits and structure compete on one hull."""

from dataclasses import replace

import pytest

from tnlm.allocation import get_allocation
from tnlm.allocation.bits import Bits, all_on_grid, on_grid, repriced
from tnlm.allocation.curves import curves
from tnlm.allocation.uniform import stay_dense
from tnlm.errors import OptionError
from tnlm.precision.grid import Precision

GRIDS = (None, Precision(8, None), Precision(4), Precision(3))
SHAPES = [(24, 32), (32, 24), (24, 24)]


@pytest.fixture
def problem(make_problem):
    return replace(make_problem(SHAPES, 0.3, unit="bytes"), grids=GRIDS)


def test_the_budget_of_bytes_is_met(problem):
    for keep in (0.5, 0.3, 0.2):
        chosen = get_allocation("loss").allocate(
            replace(problem, limits=replace(problem.limits, keep=keep))
        )
        before = sum(layer.before.bytes for layer in chosen)
        assert sum(layer.after.bytes for layer in chosen) <= keep * before


def test_more_bytes_never_lose_more(problem):
    losses = []
    for keep in (0.2, 0.3, 0.5, 0.9):
        sized = replace(problem, limits=replace(problem.limits, keep=keep))
        candidates = [c for curve in curves(sized) for c in curve]
        chosen = get_allocation("loss").allocate(sized)
        losses.append(sum(c.loss for c in candidates if c.layers[0] in chosen))
    assert losses == sorted(losses, reverse=True)


def test_matrices_that_matter_more_get_more_bits(make_problem):
    base = make_problem([(24, 32)] * 2, 0.12, effects=[1.0, 1e4], unit="bytes", formats=())
    chosen = get_allocation("loss").allocate(replace(base, grids=GRIDS))
    bits = [16 if layer.grid is None else layer.grid.bits for layer in chosen]
    assert bits[1] > bits[0]


def test_without_grids_candidates_are_left_alone(make_problem):
    problem = make_problem(SHAPES, 0.5)
    weight = problem.targets[0].weight(problem.model)
    assert Bits(problem).spread([], problem.targets[0], weight, None) == []


def test_bytes_on_a_grid(problem):
    target = problem.targets[0]
    layer = stay_dense(target, target.weight(problem.model), "why")
    found = on_grid(target, layer, None, Precision(4), 8)
    assert found.after.bytes == Precision(4).bytes(24, 32, 8)
    assert found.after.params == layer.before.params
    assert not found.note


def test_one_grid_for_all_leaves_those_that_have_one(problem):
    layers = [stay_dense(t, t.weight(problem.model), "") for t in problem.targets]
    layers[0] = on_grid(problem.targets[0], layers[0], None, Precision(8), 4)
    found = all_on_grid(problem, layers, Precision(4))
    assert [layer.grid.bits for layer in found] == [8, 4, 4]
    assert all_on_grid(problem, layers, None) == layers


def test_an_edited_plan_is_priced_again(problem):
    target = problem.targets[0]
    weight = target.weight(problem.model)
    layer = replace(stay_dense(target, weight, ""), precision={"bits": 3})
    assert repriced(target, weight, layer).after.bytes == Precision(3).bytes(24, 32, 8)
    with pytest.raises(OptionError, match="bits=9"):
        repriced(target, weight, replace(layer, precision={"bits": 9}))
