"""Time as the price of a target, from prices that are made up."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn
from transformers import GPT2Config, GPT2Model, MixtralConfig, MixtralModel

from tnlm.allocation.clock import Clock, Workload
from tnlm.allocation.energy import Energy
from tnlm.allocation.loss import LossAware
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import BudgetError, OptionError
from tnlm.layers.machine import Machine
from tnlm.layers.prices import Prices
from tnlm.layers.unfolded import unfold
from tnlm.targets.alike import alike
from tnlm.targets.channels import pairs
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.selection import select
from tnlm.targets.stacks import stack

BY_BYTES = Machine(0.0, 0.0, (1e-9,) * 5, 0.0, (1e-15,) * 4, True)
BY_CALLS = Machine(1e-6, 1e-6, (0.0,) * 5, 0.0, (1e-30,) * 4, True)


def clock(times, workload="decode"):
    return Clock(Prices("far", times), Workload.parse(workload), 4)


def time_of(clock, target, network=None):
    return clock.timed(target.dense_cost(4), target, network).time


@pytest.mark.parametrize("text", ["decode:0", "decode:", "prefill:-1", "fill", "", None, 3, "a:2"])
def test_unknown_workloads_are_refused(text):
    with pytest.raises(OptionError, match="allowed: decode, prefill, decode:SEQUENCES"):
        Workload.parse(text)


def test_workloads_say_what_they_are():
    for text in ("decode:1", "decode:8", "prefill:512"):
        assert str(Workload.parse(text)) == text
    assert str(Workload.parse("prefill")) == "prefill:512"


def test_a_matrix_is_priced_as_it_is_applied():
    target = MatrixTarget("m", "m", (30, 20))
    assert time_of(clock(BY_BYTES), target) == 30 * 20 * 4
    low_rank = get_format("low-rank")
    network = low_rank.network((30, 20), from_dict(low_rank.spec, {"rank": 5, "gauge": False}))
    assert time_of(clock(BY_BYTES), target, network) == 5 * (30 + 20) * 4
    assert time_of(clock(BY_CALLS), target, network) == 2 * time_of(clock(BY_CALLS), target)


def test_a_pair_is_priced_as_its_narrowed_matrices():
    model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_inner=8, n_layer=1, n_head=1))
    pair = pairs(model, select(model).targets)[0]
    channels = get_format("channels")
    network = channels.network(pair.shape, from_dict(channels.spec, {"width": 6}))
    assert time_of(clock(BY_BYTES), pair) == 2 * 4 * 8 * 4
    assert time_of(clock(BY_BYTES), pair, network) == 2 * 4 * 6 * 4
    assert time_of(clock(BY_CALLS), pair, network) == time_of(clock(BY_CALLS), pair)


def test_what_stays_dense_is_not_arranged_but_narrowed_matrices_are():
    model = GPT2Model(GPT2Config(vocab_size=8, n_embd=128, n_inner=512, n_layer=1, n_head=1))
    pair = pairs(model, select(model).targets)[0]
    channels = get_format("channels")
    network = channels.network(pair.shape, from_dict(channels.spec, {"width": 512}))
    lines = dataclasses.replace(BY_BYTES, loads=(4e-9, 3e-9, 2e-9, 1e-9, 1e-9))
    size = 128 * 512 * 4
    assert time_of(clock(lines), pair) == size * (4 + 2)
    assert time_of(clock(lines), pair, network) == size * (2 + 2)


def test_members_of_a_stack_apply_the_shared_factor_each():
    two = [MatrixTarget(f"h.{i}.up", f"h.{i}.up", (8, 4)) for i in (0, 1)]
    [unit] = stack(two, 2)
    low_rank = get_format("low-rank")
    network = low_rank.network(unit.shape, from_dict(low_rank.spec, {"rank": 2, "gauge": False}))
    assert time_of(clock(BY_BYTES), unit) == 2 * 8 * 4 * 4
    assert time_of(clock(BY_BYTES), unit, network) == 2 * 2 * (8 + 4) * 4


@pytest.mark.parametrize(("workload", "met"), [("decode", 2), ("decode:2", 4), ("prefill:64", 4)])
def test_experts_are_priced_by_how_many_a_pass_meets(workload, met):
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralModel(config)
    unfold(model)
    units = alike(model, select(model, ["experts"]).targets)
    unit = next(unit for unit in units if unit.name.endswith("up_proj"))
    assert time_of(clock(BY_BYTES, workload), unit) == met * 8 * 12 * 4


@pytest.mark.parametrize("allocation", [LossAware(), Energy()], ids=lambda each: each.name)
def test_the_plan_meets_a_budget_in_time(make_problem, allocation):
    problem = make_problem([(12, 10), (12, 10)], 0.8, unit="time", clock=clock(BY_BYTES))
    layers = allocation.allocate(problem)
    before, after = (sum(getattr(each, n).time for each in layers) for n in ("before", "after"))
    assert before == 2 * 12 * 10 * 4
    assert 0.6 * before < after <= 0.8 * before


def test_factors_lose_to_narrow_layers_where_a_call_costs_most(make_pairs):
    """Half as many bytes, but twice the calls: only channels make such a machine faster."""
    slow = dataclasses.replace(BY_BYTES, call=1e-6)
    problem = make_pairs(0.95, unit="time", clock=clock(slow), count=2)
    assert {each.format for each in LossAware().allocate(problem)} <= {None, "channels"}
    cheap = dataclasses.replace(problem.limits, clock=clock(BY_BYTES), keep=0.6)
    layers = LossAware().allocate(dataclasses.replace(problem, limits=cheap))
    assert "low-rank" in {each.format for each in layers}


def test_a_budget_that_nothing_meets_states_the_best(make_problem):
    problem = make_problem([(12, 10)], 0.9, unit="time", clock=clock(BY_CALLS))
    with pytest.raises(BudgetError, match=r"0\.9 of the targets' time cannot .* allow is 1$"):
        LossAware().allocate(problem)


def test_identity_blocks_are_left_out_where_order_takes_longer(make_problem):
    slow = dataclasses.replace(BY_BYTES, move=1e-6)
    problem = make_problem([(12, 10)], 0.8, unit="time", clock=clock(slow))
    [layer] = LossAware().allocate(problem)
    assert layer.spec["gauge"] is False
    fixed = dataclasses.replace(problem.limits, options={"gauge": True}, keep=1.0)
    [layer] = LossAware().allocate(dataclasses.replace(problem, limits=fixed))
    assert layer.spec.get("gauge", True)
    [layer] = LossAware().allocate(
        make_problem([(12, 10)], 0.8, unit="time", clock=clock(BY_BYTES))
    )
    assert layer.spec["gauge"] is True


def test_other_units_predict_nothing(make_problem):
    layers = LossAware().allocate(make_problem([(12, 10)], 0.7))
    assert [(each.before.time, each.after.time) for each in layers] == [(0, 0)]
    assert isinstance(make_problem([(2, 2)], 0.7).model, nn.Module)
