from __future__ import annotations

import pytest
import torch

from tnlm.errors import ModelError
from tnlm.studies.analysis import weights
from tnlm.studies.analysis.weights import weight_row


def test_moments_are_those_of_the_numbers(gaussian, monkeypatch):
    monkeypatch.setattr(weights, "ROWS", 7)
    weight = 0.3 * gaussian(40, 50) + 0.1
    row = weight_row("w", weight)
    centered = weight - weight.mean()
    assert row.mean == pytest.approx(float(weight.mean()))
    assert row.variance == pytest.approx(float(centered.square().mean()))
    assert row.kurtosis == pytest.approx(float(centered.pow(4).mean()) / row.variance**2)
    assert row.shape == (40, 50)


def test_a_normal_matrix_has_kurtosis_three_and_almost_no_zeros(gaussian):
    row = weight_row("w", gaussian(300, 300))
    assert row.kurtosis == pytest.approx(3.0, abs=0.1)
    assert row.sparsity == pytest.approx(0.008, abs=0.002)


def test_a_large_mean_does_not_cancel(gaussian):
    weight = 1e-3 * gaussian(50, 50) + 10.0
    row = weight_row("w", weight)
    assert row.variance == pytest.approx(1e-6, rel=0.1)
    assert row.kurtosis == pytest.approx(3.0, abs=0.4)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.0])
def test_equal_numbers_have_no_kurtosis(value):
    row = weight_row("w", torch.full((6, 8), value))
    assert row.kurtosis is None
    assert row.spectrum.numerical_rank == (value > 0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_sparsity_does_not_depend_on_scale(scale, gaussian):
    weight = gaussian(20, 20)
    weight[:10] = 0.0
    assert weight_row("w", scale * weight).sparsity == weight_row("w", weight).sparsity >= 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float_dtype_is_read_in_double_precision(dtype, gaussian):
    weight = gaussian(12, 9).to(dtype)
    assert weight_row("w", weight) == weight_row("w", weight.double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(3, 3)
    weight[1, 2] = bad
    with pytest.raises(ModelError, match="up_proj has 1 NaN or infinite weights"):
        weight_row("up_proj", weight)
