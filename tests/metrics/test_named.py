from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.metrics.measure import FISHER, GRADIENTS, INPUTS, LORA, MOVEMENT, SLOPES, SURGERY
from tnlm.metrics.metric import Metric
from tnlm.metrics.named import get_measure, measures
from tnlm.metrics.named.two_sided import GRADIENT_SHRINK

MEASURES = {n: m for n, m in measures().items() if m.form not in ("experts", "tokens")}

NAMES = {"moment": INPUTS, "mean": INPUTS, "magnitude": INPUTS}
NAMES |= {"gradient": GRADIENTS, "fisher": FISHER, "slope": SLOPES}
NAMES |= {"lora_inputs": LORA, "lora_outputs": LORA, "movement": MOVEMENT}
NAMES |= {"lora_A": LORA, "lora_B": LORA}
NAMES |= {"kept_rows": SURGERY, "kept_columns": SURGERY, "core": SURGERY}
OUT, IN = 4, 5


def statistics(gaussian, seed=0, shift=0.0):
    x = gaussian(30, IN, seed=seed) + shift
    g = gaussian(30, OUT, seed=seed + 1)
    squared = gaussian(OUT, IN, seed=seed + 2).square() * 1e-3
    return {
        "moment": x.T @ x / 30,
        "mean": x.mean(0),
        "magnitude": x.abs().mean(0),
        "gradient": g.T @ g / 30,
        "fisher": squared,
        "slope": gaussian(OUT, IN, seed=seed + 4),
        "lora_inputs": squared.sum(0),
        "lora_outputs": squared.sum(1),
        "lora_A": gaussian(1, IN, seed=seed + 6),
        "lora_B": gaussian(OUT, 1, seed=seed + 7),
        "movement": gaussian(IN, seed=seed + 3).square() + 0.1,
        "kept_rows": torch.arange(OUT),
        "kept_columns": torch.arange(IN),
        "core": gaussian(OUT, IN, seed=seed + 8),
    }


def build(name, found, damping=0.0):
    return get_measure(name).build(found.__getitem__, damping)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_reads_only_what_it_says_it_needs(name, gaussian):
    found, read = statistics(gaussian), set()

    def of(statistic):
        read.add(NAMES[statistic])
        return found[statistic]

    before = {key: value.clone() for key, value in found.items()}
    metric = MEASURES[name].build(of, 1e-6)
    # What the last one needs is pruned weights, not a statistic.
    assert read == (frozenset() if name == "pruned" else MEASURES[name].needs)
    assert all(torch.equal(found[key], before[key]) for key in found)  # statistics are shared
    assert metric.separable != MEASURES[name].elementwise
    assert (metric.mean is not None) == MEASURES[name].adds_bias
    assert metric.norm(gaussian(OUT, IN, seed=9)) > 0


def squares(name, error, found, damping=0.0):
    return build(name, found, damping).norm(error) ** 2


@given(seed=st.integers(0, 20), shift=st.sampled_from([0.0, 3.0]))
def test_every_measure_is_its_formula(seed, shift, gaussian):
    found, error = statistics(gaussian, seed, shift), gaussian(OUT, IN, seed=seed + 5)
    F, mean = found["fisher"], found["mean"]
    C = found["moment"] - torch.outer(mean, mean)
    G = found["gradient"]
    G = (1 - GRADIENT_SHRINK) * G + GRADIENT_SHRINK * G.trace() / OUT * torch.eye(OUT).double()
    expected = {
        "identity": error.square().sum(),
        "diagonal": (error.square() * found["magnitude"]).sum(),
        "input": torch.trace(error @ found["moment"] @ error.T),
        "sloped-input": torch.trace(error @ found["moment"] @ error.T),
        "covariance": torch.trace(error @ C @ error.T),
        "centered": torch.trace(error @ C @ error.T),
        "two-sided": torch.trace(G @ error @ found["moment"] @ error.T),
        "fisher-inputs": (F.mean(0) * error.square()).sum(),
        "fisher-outputs": (F.mean(1)[:, None] * error.square()).sum(),
        "fisher-both": (torch.outer(F.mean(1), F.mean(0)) / F.mean() * error.square()).sum(),
        "fisher-elements": (F / F.mean() * error.square()).sum(),
        "lora-fisher": (F.sum(0) * error.square()).sum(),
        "lora-taylor": (F.sum(0) * error.square()).sum(),
        "lora-both": (torch.outer(F.sum(1), F.sum(0)) / F.sum(1).mean() * error.square()).sum(),
        "lora-kept": (F.sum(0) * error.square()).sum(),
        "surgery": torch.trace(found["gradient"] @ error @ found["moment"] @ error.T),
        "pruned": error.square().sum(),
        "movement": (found["movement"] * error.square()).sum(),
    }
    assert set(expected) == set(MEASURES)
    for name, value in expected.items():
        assert squares(name, error, found) == pytest.approx(float(value), rel=1e-9), name


@given(seed=st.integers(0, 20), scale=st.sampled_from([1e-12, 1e-3, 1e5]))
def test_fisher_counts_once_and_one_row_by_column_pair_is_exact(seed, scale, gaussian):
    error = gaussian(OUT, IN, seed=seed)
    rows, columns = (gaussian(n, seed=seed + n).square() + 0.1 for n in (OUT, IN))
    F = scale * torch.outer(rows, columns)
    for damping in (0.0, 1e-6):
        value = squares("fisher-both", error, {"fisher": F.float()}, damping)
        assert value == pytest.approx(float((F * error.square()).sum()), rel=1e-4)


@pytest.mark.parametrize("name", [n for n in MEASURES if FISHER in MEASURES[n].needs])
def test_an_even_fisher_is_the_plain_norm(name, gaussian):
    error = gaussian(OUT, IN)
    found = {"fisher": torch.full((OUT, IN), 0.25)}
    scale = 1.0 if name == "fisher-elements" else 0.25
    assert squares(name, error, found) == pytest.approx(scale * float(error.square().sum()))


def test_covariance_leaves_the_mean_and_centered_moves_it_into_a_bias(gaussian):
    found = statistics(gaussian, shift=2.0)
    plain, biased = (build(name, found) for name in ("covariance", "centered"))
    assert plain.mean is None
    assert torch.equal(biased.mean, found["mean"])
    torch.testing.assert_close(plain.inputs.values, biased.inputs.values)
    assert not MEASURES["covariance"].adds_bias


def test_the_gradients_are_damped_by_their_own_share(gaussian):
    found = statistics(gaussian)
    sharp, damped = (build("two-sided", found, damping) for damping in (0.0, 0.5))
    torch.testing.assert_close(sharp.outputs.values, damped.outputs.values)
    assert not torch.allclose(sharp.inputs.values, damped.inputs.values)
    assert MEASURES["two-sided"].damping == 0.05


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("dead", ["all", "row", "column", "gradient"])
def test_silence_is_finite(name, damping, dead, gaussian):
    found, weight = statistics(gaussian), gaussian(OUT, IN, seed=4)
    if dead == "all":
        found = {key: torch.zeros_like(value) for key, value in found.items()}
    elif dead == "row":
        found["fisher"][1] = 0.0
        found["gradient"][1] = found["gradient"][:, 1] = 0.0
    elif dead == "gradient":
        found["gradient"].zero_()
    else:
        found["moment"][2] = found["moment"][:, 2] = 0.0
        found["mean"][2] = found["magnitude"][2] = 0.0
        found["fisher"][:, 2] = 0.0
    metric = build(name, found, damping)
    assert metric.norm(weight) > 0
    start = metric.start()
    left, right = start.low_rank(weight, OUT)
    assert bool(left.isfinite().all())
    assert bool(right.isfinite().all())
    assert start.relative(weight, left @ right) < 1e-6
    if dead == "all":
        assert metric.norm(weight) == pytest.approx(Metric().norm(weight))
    if dead == "column" and INPUTS in MEASURES[name].needs:
        only = torch.zeros_like(weight)
        only[:, 2] = weight[:, 2]
        assert metric.relative(weight, weight - only) <= 2 * damping**0.5


@pytest.mark.parametrize("name", ["covariance", "centered"])
@pytest.mark.parametrize("value", [0.1, 7.3, 1e6])
def test_constant_inputs_have_no_spread(name, value, gaussian):
    x = torch.full((1000, IN), value, dtype=torch.float64)
    even = {"moment": x.T @ x / 1000, "mean": x.mean(0)}
    error = gaussian(OUT, IN)
    assert squares(name, error, even) == pytest.approx(float(error.square().sum()))
    x[:, 1] += 0.01 * value * gaussian(1000)  # one column varies: only it counts
    varied = {"moment": x.T @ x / 1000, "mean": x.mean(0)}
    spread = float(x[:, 1].var(unbiased=False))
    expected = spread * float(error[:, 1].square().sum())
    assert squares(name, error, varied) == pytest.approx(expected, rel=1e-6)


def test_an_unknown_measure_names_the_known():
    with pytest.raises(OptionError, match=r"unknown metric 'two-side'; did you mean 'two-sided'"):
        get_measure("two-side")
    for wrong in (None, 3, ["input"]):
        with pytest.raises(OptionError, match="unknown metric"):
            get_measure(wrong)
