"""The predicted error of rounding is close to the measured one."""

import pytest
import torch

from tnlm.precision.grid import Precision
from tnlm.precision.noise import Noise
from tnlm.precision.rounding import squared_error, with_feedback


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_prediction_is_within_a_third(bits, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 96, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 96, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(96, 96, generator=generator, dtype=torch.float64)
    moment, grid = inputs.T @ inputs / 400, Precision(bits, 32, symmetric)
    measured = squared_error(weight, with_feedback(weight, moment, grid, torch.float32), moment)
    assert 0.66 < Noise(weight, moment).squared(grid) / measured < 1.5


def test_outputs_are_weighted():
    weight = torch.randn(4, 16, dtype=torch.float64)
    whole = Noise(weight).squared(Precision(4))
    assert Noise(weight, rows=torch.full((4,), 3.0)).squared(Precision(4)) == pytest.approx(
        3 * whole
    )


def test_a_diagonal_moment_weighs_the_columns():
    weight = torch.randn(4, 16, dtype=torch.float64)
    whole = Noise(weight).squared(Precision(4))
    found = Noise(weight, torch.full((16,), 2.0)).squared(Precision(4))
    assert found == pytest.approx(2 * whole)
