from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.surgery import as_order, remaining, removal_losses
from tnlm.errors import CalibrationError


def patient(rows, columns, gaussian):
    """A matrix with both sides of its K-FAC."""
    left, right = gaussian(rows, 2 * rows, seed=1), gaussian(columns, 2 * columns, seed=2)
    sides = (each.double() @ each.double().T for each in (left, right))
    return gaussian(rows, columns).double(), *sides


def loss(change, outputs, inputs):
    return float((outputs @ change @ inputs * change).sum() / 2)


def placed(core, rows, columns, shape):
    whole = torch.zeros(shape, dtype=core.dtype)
    whole[rows[:, None], columns] = core
    return whole


def brute_force(weight, outputs, inputs, rows, columns):
    """Solve for the kept entries as one system over all entries of the matrix."""
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    kept[rows[:, None], columns] = True
    free = kept.flatten()
    curvature = torch.kron(outputs, inputs)
    pulled = (curvature @ weight.flatten())[free]
    solved = torch.linalg.solve(curvature[free][:, free], pulled)
    return solved.reshape(len(rows), len(columns))


def but(removed, size):
    return torch.tensor([index for index in range(size) if index != removed])


@pytest.mark.parametrize("shape", [(5, 7), (7, 4), (1, 3)])
def test_the_predicted_loss_is_that_of_the_best_update(shape, gaussian):
    weight, outputs, inputs = patient(*shape, gaussian)
    by_row, by_column = removal_losses(weight, outputs, inputs)
    everything = [torch.arange(size) for size in shape]
    for axis, losses in enumerate((by_row, by_column)):
        for index in range(shape[axis]) if shape[axis] > 1 else ():
            kept = list(everything)
            kept[axis] = but(index, shape[axis])
            core = brute_force(weight, outputs, inputs, *kept)
            change = placed(core, *kept, shape) - weight
            assert float(losses[index]) == pytest.approx(loss(change, outputs, inputs))


@given(rows=st.integers(1, 4), columns=st.integers(1, 5), seed=st.integers(0, 20))
def test_the_update_is_the_least_squares_solution(rows, columns, seed, gaussian):
    shape = (5, 6)
    weight, outputs, inputs = patient(*shape, gaussian)
    generator = torch.Generator().manual_seed(seed)
    kept = [
        torch.randperm(size, generator=generator)[:count].sort().values
        for size, count in zip(shape, (rows, columns), strict=True)
    ]
    core = remaining(weight, outputs, inputs, *kept)
    torch.testing.assert_close(core, brute_force(weight, outputs, inputs, *kept))


def test_two_steps_under_the_same_sides_are_one(gaussian):
    shape = (6, 8)
    weight, outputs, inputs = patient(*shape, gaussian)
    rows, columns = torch.tensor([0, 2, 5]), torch.tensor([1, 2, 4, 7])
    first = torch.tensor([0, 2, 3, 5])
    half = remaining(weight, outputs, inputs, first, torch.arange(8))
    again = remaining(half, outputs[first][:, first], inputs, torch.tensor([0, 1, 3]), columns)
    torch.testing.assert_close(again, remaining(weight, outputs, inputs, rows, columns))


def test_dead_inputs_cost_nothing(gaussian):
    weight, outputs, inputs = patient(3, 4, gaussian)
    inputs[2], inputs[:, 2] = 0, 0
    _, columns = removal_losses(weight, outputs, inputs)
    assert float(columns[2]) < 1e-9 * float(columns.sum())
    assert remaining(weight, outputs, inputs, torch.arange(3), but(2, 4)).isfinite().all()


def test_an_order_is_a_permutation_that_starts_with_what_is_kept():
    assert as_order(torch.tensor([3, 1]), 5).tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_a_side_that_weighs_nothing_ends_in_an_error(value, side):
    sides = [torch.eye(3).double(), torch.eye(3).double()]
    sides[side] = torch.full((3,), value).double().diag()
    with pytest.raises(CalibrationError, match="not finite or has negative eigenvalues"):
        removal_losses(torch.ones(3, 3).double(), *sides)
