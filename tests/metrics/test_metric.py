from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import CalibrationError
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side

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
        small = whitened if m <= n else whitened.T
        torch.testing.assert_close(metric.gram(weight), small @ small.T, atol=1e-10 * scale, rtol=0)
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
    torch.testing.assert_close(metric.inputs.root @ metric.inputs.root.T, metric.inputs.values)


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


def side(n, kind, seed, gaussian):
    if kind == "none":
        return None
    if kind == "diagonal":
        return Side(gaussian(n, seed=seed).square() + 0.05)
    tokens = max(1, n // 2) if kind == "singular" else n + 4
    x = gaussian(tokens, n, seed=seed)
    return Side(x.T @ x / tokens)


def dense(part, n):
    if part is None:
        return torch.eye(n, dtype=torch.float64)
    return part.values.diag() if part.is_diagonal else part.values


kinds = st.sampled_from(["none", "diagonal", "full", "singular"])


@given(m=sizes, n=sizes, rows=kinds, columns=kinds, seed=seeds)
def test_both_sides_weigh_the_error(m, n, rows, columns, seed, gaussian):
    metric = Metric(side(m, rows, seed, gaussian), side(n, columns, seed + 1, gaussian))
    error = gaussian(m, n, seed=seed + 2)
    G, C = dense(metric.outputs, m), dense(metric.inputs, n)
    squared = float(torch.trace(G @ error @ C @ error.T))
    assert metric.norm(error) ** 2 == pytest.approx(squared, rel=1e-9)
    assert float(metric.whiten(error).square().sum()) == pytest.approx(squared, rel=1e-7)
    torch.testing.assert_close(metric.pull(error), G @ error @ C, rtol=1e-9, atol=1e-9)
    assert float(metric.spectrum(error).sum()) == pytest.approx(squared, rel=1e-7)
    assert float(metric.gram(error).trace()) == pytest.approx(squared, rel=1e-7)


@given(m=sizes, n=sizes, rows=kinds, columns=kinds, part=st.floats(0, 1), seed=seeds)
def test_low_rank_attains_the_tail_and_nothing_is_better(m, n, rows, columns, part, seed, gaussian):
    metric = Metric(side(m, rows, seed, gaussian), side(n, columns, seed + 1, gaussian))
    weight, rank = gaussian(m, n, seed=seed + 2), max(1, round(part * min(m, n)))
    left, right = metric.low_rank(weight, rank)
    assert left.shape == (m, rank)
    assert right.shape == (rank, n)
    error = metric.norm(weight - left @ right) ** 2
    whitened = torch.linalg.svdvals(metric.whiten(weight)).square()
    scale = float(whitened.sum())
    assert error == pytest.approx(float(whitened[rank:].sum()), rel=1e-6, abs=1e-9 * scale)
    if rank == min(m, n):
        assert error <= 1e-9 * scale
    for shake in range(3):  # near to the optimum, and anywhere
        other = (left + 0.1 * gaussian(m, rank, seed=shake)) @ right
        assert metric.norm(weight - other) ** 2 >= error - 1e-9 * scale
        anywhere = gaussian(m, rank, seed=shake) @ gaussian(rank, n, seed=shake + 9)
        assert metric.norm(weight - anywhere) ** 2 >= error - 1e-9 * scale


@given(m=sizes, n=sizes, columns=kinds, seed=seeds)
def test_factors_stay_small_under_a_singular_form(m, n, columns, seed, gaussian):
    metric = Metric(side(m, "singular", seed, gaussian), side(n, columns, seed + 1, gaussian))
    weight = gaussian(m, n, seed=seed + 2)
    left, right = metric.low_rank(weight, min(m, n))
    # An inverse of rounding errors would be 1e8.
    least = torch.linalg.eigvalsh(metric.outputs.values)
    least = least[least > 1e-9 * float(least.max())].min()
    if m > n:  # what G does not see is W's own there: the product stays near W
        assert float((left @ right).norm()) <= 1e3 * float(weight.norm())
        return
    assert float(left.abs().max()) <= 1e3 * float(least) ** -0.5
    assert float(right.norm()) <= float(metric.scale_outputs(weight).norm()) * 1.001


@given(m=sizes, n=sizes, value=st.sampled_from([1e-9, 1.0, 1e6]), seed=seeds)
def test_even_weights_are_the_plain_decomposition(m, n, value, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), max(1, min(m, n) // 2)
    even = Metric(Side(torch.full((m,), value)), Side(torch.full((n,), value)))
    left, right = even.low_rank(weight, rank)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(
        left @ right, u[:, :rank] * s[:rank] @ vh[:rank], atol=1e-8, rtol=1e-6
    )


@given(m=sizes, n=sizes, seed=seeds)
def test_weights_equal_within_rows_are_those_of_the_rows(m, n, seed, gaussian):
    rows, error = gaussian(m, seed=seed).square() + 0.1, gaussian(m, n, seed=seed + 1)
    every = Elementwise(rows[:, None].expand(m, n))
    plain = Metric(Side(rows / rows.mean()))
    assert every.norm(error) == pytest.approx(plain.norm(error), rel=1e-9)
    for here, there in zip(every.start().low_rank(error, 1), plain.low_rank(error, 1), strict=True):
        torch.testing.assert_close(here.abs(), there.abs(), atol=1e-6, rtol=1e-6)
    columns = Elementwise(rows[None].expand(n, m))
    assert columns.norm(error.T) == pytest.approx(every.norm(error), rel=1e-9)


@given(m=sizes, n=sizes, seed=seeds)
def test_every_entry_has_its_own_weight(m, n, seed, gaussian):
    weights, error = gaussian(m, n, seed=seed).square() + 0.1, gaussian(m, n, seed=seed + 1)
    metric = Elementwise(weights)
    scaled = weights / weights.mean()
    squared = float((scaled * error.square()).sum())
    assert metric.norm(error) ** 2 == pytest.approx(squared, rel=1e-9)
    assert float(metric.whiten(error).square().sum()) == pytest.approx(squared, rel=1e-9)
    torch.testing.assert_close(metric.pull(error), scaled * error)
    # Scaled weights give the same metric.
    assert Elementwise(1e-20 * weights).norm(error) == pytest.approx(metric.norm(error))
    near = metric.start()
    assert near.separable
    torch.testing.assert_close(near.outputs.values, scaled.mean(1))
    torch.testing.assert_close(near.inputs.values, scaled.mean(0))


def test_no_entry_is_free():
    weights = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
    metric = Elementwise(weights, floor=0.25)
    assert metric.weights.tolist() == [[0.25, 2.0], [0.25, 2.0]]
    assert Elementwise(torch.zeros(2, 3)).weights.tolist() == [[1.0] * 3] * 2
    assert Elementwise(torch.zeros(2, 3)).norm(torch.ones(2, 3)) == pytest.approx(6**0.5)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(bad):
    with pytest.raises(CalibrationError, match="finite and not negative"):
        Elementwise(torch.tensor([[1.0, bad]]))


def test_a_metric_that_sees_nothing_of_a_weight_has_no_relative_error():
    blind = Metric(inputs=Side(torch.tensor([1.0, 0.0])))
    assert blind.relative(torch.tensor([[0.0, 5.0]]), torch.tensor([[0.0, 0.0]])) == 0.0


@given(m=st.integers(3, 8), n=st.integers(3, 8), seed=seeds)
def test_whitening_beats_centring_unless_the_mean_goes_into_a_bias(m, n, seed, gaussian):
    weight = gaussian(m, n, seed=seed)
    x = gaussian(40, n, seed=seed + 1) * gaussian(n, seed=seed + 2) + 3 * gaussian(n, seed=seed + 3)
    mean = x.mean(0)
    moments = x.T @ x / len(x), (x - mean).T @ (x - mean) / len(x)
    rank = max(1, min(m, n) // 2)

    def outputs(metric, *, bias):
        left, right = metric.low_rank(weight, rank)
        error = weight - left @ right
        residue = x @ error.T - (error @ mean if bias else 0.0)
        return float(residue.square().sum(1).mean())

    whitened, centred = (Metric(inputs=Side(moment)) for moment in moments)
    best = outputs(whitened, bias=False)
    slack = 1e-9 * float((x @ weight.T).square().sum())
    assert best <= outputs(centred, bias=False) + slack
    assert best <= outputs(Metric(), bias=False) + slack
    assert outputs(centred, bias=True) <= best + slack


@given(m=sizes, n=sizes, seed=seeds)
def test_a_weight_that_was_changed_is_measured_anew(m, n, seed, gaussian):
    metric = Metric(side(m, "full", seed, gaussian), side(n, "full", seed + 1, gaussian))
    weight = gaussian(m, n, seed=seed + 2)
    before = metric.norm(weight)
    assert metric.norm(weight) == before
    assert metric.norm(weight.mul_(2.0)) == pytest.approx(2.0 * before)
    assert float(metric.spectrum(weight).sum()) == pytest.approx(4.0 * before**2)
    with torch.inference_mode():
        frozen = weight.clone()
        assert metric.norm(frozen.mul_(2.0)) == pytest.approx(4.0 * before)
        assert metric.norm(frozen.mul_(2.0)) == pytest.approx(8.0 * before)


def test_an_error_leaves_what_is_kept_for_the_fit(gaussian):
    sides = [Side(root @ root.T) for root in (gaussian(4, 4, seed=1), gaussian(6, 6, seed=2))]
    metric, weight = Metric(*sides), gaussian(4, 6, seed=3)
    core = metric._core(weight)
    assert metric.relative(weight, weight + gaussian(4, 6, seed=4)) > 0
    assert metric._core(weight) is core
