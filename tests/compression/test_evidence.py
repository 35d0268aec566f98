from __future__ import annotations

import pytest
import torch

from tnlm.calibration.store import Statistics
from tnlm.compression.evidence import Evidence
from tnlm.compression.gatherers.base import Found, by_module
from tnlm.compression.request import make_request
from tnlm.errors import CalibrationError
from tnlm.metrics.measure import FISHER
from tnlm.metrics.named import measures
from tnlm.targets.matrix import MatrixTarget

# Only some formats, and one allocation, can be fitted under the others.
SPECIAL = ("experts", "tokens", "surgery")
MEASURES = {n: m for n, m in measures().items() if m.form not in SPECIAL}

OUT, IN = 4, 3
TARGET = MatrixTarget("a.q", "a.q", (OUT, IN))


def evidence_of(metric, gaussian, *, silent=(), allocation="loss", **changes):
    """What is known of one matrix, from statistics made up for it."""
    x, g = gaussian(20, IN) + 1.0, 0.01 * gaussian(20, OUT, seed=1)
    found = {
        "moment": x.T @ x / 20,
        "mean": x.mean(0),
        "magnitude": x.abs().mean(0),
        "gradient": g.T @ g / 20,
        "fisher": 1e-4 * gaussian(OUT, IN, seed=2).square().float(),
    } | changes
    found["slope"] = gaussian(OUT, IN, seed=3)
    found["lora_inputs"] = found["fisher"].double().sum(0)
    found["lora_outputs"] = found["fisher"].double().sum(1)
    found["lora_A"], found["lora_B"] = gaussian(1, IN, seed=4), gaussian(OUT, 1, seed=5)
    found["kept_rows"], found["kept_columns"] = torch.arange(OUT), torch.arange(IN)
    found["core"] = gaussian(OUT, IN, seed=6)
    found["movement"] = found["lora_inputs"].clone()
    for name in silent:
        found[name] = torch.zeros_like(found[name])
    store = Statistics(tokens=20)
    own = ("movement", "kept_rows", "kept_columns", "core")  # are kept by target
    store.put("a.q", ["a.q"], {name: value for name, value in found.items() if name not in own})
    sources = dict.fromkeys(found, by_module(store))
    by_target = Found(lambda target, name: {TARGET.name: found[name]}[target.name])
    sources.update(dict.fromkeys(own, by_target))
    asked = make_request("svd", metric=metric, allocation=allocation)
    return Evidence(asked.measure, asked.damping, sources), found


def effect(known, error):
    return known.metric(TARGET).norm(error) ** 2 * known.importance(TARGET)


def test_the_importance_of_every_measure_is_its_formula(gaussian):
    for name in MEASURES:
        known, found = evidence_of(name, gaussian)
        g, c = (float(found[k].diagonal().mean()) for k in ("gradient", "moment"))
        expected = dict.fromkeys(MEASURES, 1.0)
        expected |= {"identity": g * c, "diagonal": g * c / float(found["magnitude"].mean())}
        expected |= dict.fromkeys(("input", "sloped-input", "covariance", "centered"), g)
        expected["fisher-elements"] = float(found["fisher"].mean())
        weight = float(found["lora_inputs"].mean())
        expected |= {name: g * c / weight for name in MEASURES if name.startswith("lora")}
        expected["pruned"] = g * c
        expected["movement"] = g * c / float(found["movement"].mean())
        assert known.importance(TARGET) == pytest.approx(expected[name]), name


@pytest.mark.parametrize("name", MEASURES)
def test_harm_has_one_unit_under_every_measure(name, gaussian):
    # Inputs, gradients and Fisher information that are all even: all measures then agree.
    even = {
        "moment": 9.0 * torch.eye(IN).double(),
        "mean": torch.zeros(IN).double(),
        "magnitude": torch.full((IN,), 3.0).double(),
        "gradient": 0.25 * torch.eye(OUT).double(),
        "fisher": torch.full((OUT, IN), 2.25),
    }
    known, _ = evidence_of(name, gaussian, **even)
    error = gaussian(OUT, IN, seed=5)
    assert effect(known, error) == pytest.approx(2.25 * float(error.square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_harm_follows_the_scale_of_the_data(name, scale, gaussian):
    plain, found = evidence_of(name, gaussian)
    error = gaussian(OUT, IN, seed=5)
    powers = {"moment": 2, "mean": 1, "magnitude": 1, "fisher": 2}
    louder = {key: found[key] * scale**power for key, power in powers.items()}
    loud, _ = evidence_of(name, gaussian, **louder)
    assert effect(loud, error) == pytest.approx(scale**2 * effect(plain, error), rel=1e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_what_never_acts_on_the_loss_has_no_importance(name, gaussian):
    needs = MEASURES[name].needs
    for silent in (("fisher",), ("gradient",), ("moment", "mean", "magnitude")):
        known, _ = evidence_of(name, gaussian, silent=silent)
        reads_fisher = FISHER in needs
        assert (known.importance(TARGET) == 0.0) == (reads_fisher == (silent == ("fisher",)))
        assert known.metric(TARGET).norm(torch.ones(OUT, IN)) > 0


def test_without_gradients_all_count_the_same(gaussian):
    for name in ("identity", "input", "diagonal"):
        known, _ = evidence_of(name, gaussian, allocation="energy")
        del known.sources["gradient"], known.sources["fisher"]
        assert known.importance(TARGET) == 1.0


def test_the_latest_metric_is_kept_until_it_is_forgotten(gaussian):
    known, found = evidence_of("input", gaussian)
    first = known.metric(TARGET)
    assert known.metric(TARGET) is first
    newer = known.metric(TARGET, {"moment": 4.0 * found["moment"]})
    error = torch.ones(OUT, IN)
    assert newer.norm(error) == pytest.approx(2.0 * first.norm(error))
    assert known.metric(TARGET) is first
    known.forget()
    assert known.metric(TARGET) is not first


def test_newer_statistics_replace_only_what_they_hold(gaussian):
    known, found = evidence_of("two-sided", gaussian)
    newer = known.metric(TARGET, {"moment": torch.eye(IN).double()})
    torch.testing.assert_close(newer.outputs.values, known.metric(TARGET).outputs.values)
    torch.testing.assert_close(newer.inputs.values, torch.eye(IN).double())
    assert found["moment"].shape == (IN, IN)


def test_statistics_that_were_not_gathered_are_named(gaussian):
    known, _ = evidence_of("two-sided", gaussian)
    del known.sources["gradient"], known.sources["fisher"]
    with pytest.raises(CalibrationError, match=r"gradient of a\.q was not gathered"):
        known.metric(TARGET)
