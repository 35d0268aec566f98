from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.calibration.metrics import InputMoment, Metric
from tnlm.errors import CalibrationError

sizes, seeds = st.integers(1, 10), st.integers(0, 20)
tokens = st.sampled_from([1, 2, 5, 40])
DAMPING = 1e-6


def moment(x, damping=DAMPING):
    return InputMoment(x.T @ x / len(x), damping)


@given(m=sizes, n=sizes, count=tokens, seed=seeds)
def test_the_norm_is_the_mean_output_error_on_the_data(m, n, count, seed, gaussian):
    x, error = gaussian(count, n, seed=seed), gaussian(m, n, seed=seed + 1)
    expected = float((x @ error.T).square().sum(1).mean())
    assert moment(x, damping=0.0).norm(error) ** 2 == pytest.approx(expected, rel=1e-9)


@given(m=sizes, n=sizes, count=tokens, seed=seeds)
def test_all_views_of_a_metric_agree(m, n, count, seed, gaussian):
    weight = gaussian(m, n, seed=seed)
    for metric in (Metric(), moment(gaussian(count, n, seed=seed + 1))):
        whitened = metric.whiten(weight)
        scale = float(whitened.square().sum())
        assert metric.norm(weight) == pytest.approx(float(whitened.norm()), rel=1e-9)
        torch.testing.assert_close(
            metric.output_gram(weight), whitened @ whitened.T, atol=1e-10 * scale, rtol=0
        )
        spectrum = metric.spectrum(weight)
        assert len(spectrum) == min(m, n)
        torch.testing.assert_close(
            spectrum, torch.linalg.svdvals(whitened).square(), atol=1e-10 * scale, rtol=0
        )


@given(m=sizes, n=sizes, part=st.floats(0, 1), count=tokens, seed=seeds)
def test_leading_outputs_hold_most_energy(m, n, part, count, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), max(1, round(part * min(m, n)))
    for metric in (Metric(), moment(gaussian(count, n, seed=seed + 1))):
        basis, whitened = metric.leading_outputs(weight, rank), metric.whiten(weight)
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, eye, atol=1e-10, rtol=0)
        energy = torch.linalg.svdvals(whitened)[:rank].square().sum()
        kept = (basis.T @ whitened).square().sum()
        assert float(kept) == pytest.approx(float(energy), rel=1e-9)


@given(n=sizes, count=tokens, scale=st.sampled_from([1e-8, 1e-3, 1e6]), seed=seeds)
def test_relative_errors_do_not_depend_on_the_scale_of_the_data(n, count, scale, seed, gaussian):
    x, weight = gaussian(count, n, seed=seed), gaussian(4, n, seed=seed + 1)
    other = gaussian(4, n, seed=seed + 2)
    expected = moment(x).relative(weight, other)
    assert moment(scale * x).relative(weight, other) == pytest.approx(expected, rel=1e-6)


@given(m=sizes, n=sizes, seed=seeds)
def test_even_inputs_give_the_frobenius_norm(m, n, seed, gaussian):
    error = gaussian(m, n, seed=seed)
    even = InputMoment(torch.eye(n))
    assert even.norm(error) == pytest.approx(Metric().norm(error), rel=DAMPING)
    assert Metric().norm(error) == pytest.approx(float(error.norm()), rel=1e-12)


@given(n=sizes, count=tokens, seed=seeds)
def test_damping_counts_what_the_data_never_showed(n, count, seed, gaussian):
    metric = moment(gaussian(count, n, seed=seed))
    values = torch.linalg.eigvalsh(metric.inputs.values)
    scale = float(metric.inputs.values.diagonal().mean())
    assert float(values.min()) >= 0.99 * DAMPING * scale - 1e-14 * scale
    torch.testing.assert_close(metric.inputs.root @ metric.inputs.root, metric.inputs.values)


def test_silence_says_nothing_about_directions(gaussian):
    error = gaussian(3, 4)
    for damping in (0.0, DAMPING):
        silent = InputMoment(torch.zeros(4, 4), damping)
        assert silent.norm(error) == pytest.approx(Metric().norm(error))


def test_relative_errors_of_nothing_and_of_everything(gaussian):
    weight, zero = gaussian(3, 4), torch.zeros(3, 4)
    for metric in (Metric(), moment(gaussian(9, 4, seed=1))):
        assert metric.relative(weight, weight) == 0.0
        assert metric.relative(weight, zero) == pytest.approx(1.0)
        assert metric.relative(zero, zero) == 0.0


def test_computed_in_float64_from_any_dtype(gaussian):
    weight, second = gaussian(3, 4).bfloat16(), torch.eye(4, dtype=torch.float32)
    metric = InputMoment(second)
    assert metric.whiten(weight).dtype == metric.inputs.values.dtype == torch.float64
    assert torch.equal(second, torch.eye(4))  # damping made a copy
    parameter = torch.nn.Parameter(gaussian(3, 4))
    assert not metric.whiten(parameter).requires_grad
    assert metric.norm(parameter) > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_must_be_finite(bad):
    second = torch.eye(3)
    second[1, 1] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        InputMoment(second)
