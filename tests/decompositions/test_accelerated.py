"""Weights of single entries: far below what eight plain sweeps reach, also on heavy tails."""

from __future__ import annotations

import pytest
import torch

import tnlm
from tnlm.decompositions.accelerated import SWEEPS, accelerated
from tnlm.decompositions.als import als
from tnlm.decompositions.base import from_dict, to_dict
from tnlm.decompositions.low_rank import FORMAT, LowRankSpec, _balanced, _closed_form
from tnlm.errors import OptionError
from tnlm.metrics.metric import Elementwise

DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}


def problem(tail, shape=(40, 32), rank=6, seed=1):
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=made).double()
    noise = torch.randn(*shape, generator=made)
    if tail == "cauchy":
        weights = (noise / torch.randn(*shape, generator=made).abs().clamp_min(1e-3)).square()
    else:
        weights = torch.exp(tail * noise)
    metric = Elementwise(weights)
    start, _ = _closed_form(weight, metric, rank)
    return FORMAT.network(shape, LowRankSpec(rank)), weight, metric, start


@pytest.mark.parametrize("tail", [1, 2, 4, "cauchy"])
def test_no_more_than_1_percent_above_200_plain_sweeps(tail):
    given = problem(tail)
    fit = accelerated(*given)
    long = als(*given, sweeps=200, stall=0.0)
    assert fit.objective[-1] ** 0.5 <= 1.01 * long.objective[-1] ** 0.5
    assert fit.objective == sorted(fit.objective, reverse=True)
    _, weight, metric, _ = given
    product = fit.factors["left"] @ fit.factors["right"]
    assert metric.norm(weight - product) ** 2 == pytest.approx(fit.objective[-1], rel=1e-9)


def test_light_tails_end_early():
    assert len(accelerated(*problem(0.5)).objective) < 40


def test_sweeps_are_the_most():
    given = problem(4)
    assert len(accelerated(*given, sweeps=3).objective) == 4
    few, many = (accelerated(*given, sweeps=n).objective[-1] for n in (10, 40))
    assert many < few


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_ridge_takes_its_optimum(scale):
    """Under even weights the optimum is known: singular values lose λ."""
    _, weight, _, _ = problem(1)
    weight, metric = scale * weight, Elementwise(torch.ones(40, 32))
    start = _balanced(_closed_form(weight, metric, 6)[0])
    network = FORMAT.network((40, 32), LowRankSpec(6))
    fit = accelerated(network, weight, metric, start, ridge=2.0)
    strength = 2.0 * float(weight.square().mean()) ** 0.5
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    wanted = (u[:, :6] * (s[:6] - strength)) @ v[:6]
    product = fit.factors["left"] @ fit.factors["right"]
    torch.testing.assert_close(product, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    assert fit.objective == sorted(fit.objective, reverse=True)


def test_a_ridge_is_stationary_under_any_weights():
    network, weight, metric, start = problem(1)
    fit = accelerated(network, weight, metric, _balanced(start), ridge=0.5, sweeps=400)
    factors = {name: f.clone().requires_grad_() for name, f in fit.factors.items()}
    error = weight - factors["left"] @ factors["right"]
    strength = 0.5 * float(weight.square().mean()) ** 0.5
    squares = sum(f.square().sum() for f in factors.values())
    objective = (metric.weights * error.square()).sum() + strength * squares
    assert float(objective.detach()) == pytest.approx(fit.objective[-1], rel=1e-9)
    for gradient in torch.autograd.grad(objective, list(factors.values())):
        assert float(gradient.norm()) < 0.02 * float(objective.detach())


def test_options_reach_the_fit_and_the_plan(make_model):
    options = {"targets": ["q_proj"], "rank": 4, **DATA}
    plan = tnlm.plan(make_model("llama"), "tfwsvd", ridge=1.0, sweeps=5, **options)
    assert plan.layers[0].spec == {"rank": 4, "gauge": True, "ridge": 1.0, "sweeps": 5}
    plan = tnlm.Plan.from_json(plan.to_json())
    models = [
        tnlm.compress(make_model("llama"), plan, **DATA),
        tnlm.compress(make_model("llama"), "tfwsvd", ridge=1.0, sweeps=5, **options),
        tnlm.compress(make_model("llama"), "tfwsvd", **options),
    ]
    logits = [model(torch.arange(3, 19)[None]).logits for model in models]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert tnlm.report(models[2]).plan.layers[0].spec == {"rank": 4, "gauge": True}


def test_a_spec_is_written_as_it_was_at_its_defaults():
    assert to_dict(LowRankSpec(3)) == {"rank": 3, "gauge": True}
    spec = LowRankSpec(3, ridge=0.5)
    assert from_dict(LowRankSpec, to_dict(spec)) == spec
    assert from_dict(LowRankSpec, {"rank": 3}).sweeps == SWEEPS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1.0}, "ridge=-1.0; allowed: a finite number >= 0"),
        ({"ridge": float("nan")}, "ridge=nan"),
        ({"ridge": True}, "ridge=True"),
        ({"sweeps": 0}, "sweeps=0; allowed: a whole number >= 1"),
        ({"sweeps": 2.5}, "sweeps=2.5"),
    ],
)
def test_options_out_of_range_are_refused(options, message, make_model):
    with pytest.raises(OptionError, match=message):
        tnlm.compress(make_model("llama"), "tfwsvd", **options, **DATA)


@pytest.mark.parametrize("options", [{"ridge": 0.1}, {"sweeps": 9}])
@pytest.mark.parametrize("scheme", ["svd", "fwsvd", "modegpt"])
def test_options_that_cannot_act_are_refused(scheme, options, make_model):
    data = {} if scheme == "svd" else DATA
    with pytest.raises(OptionError, match="has no effect with metric="):
        tnlm.compress(make_model("llama"), scheme, **options, **data)
