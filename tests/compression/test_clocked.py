"""Budgets in time, from the call to the report, with prices that are made up."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import ViTConfig, ViTModel

import tnlm
from tnlm.compression import clocked
from tnlm.errors import BudgetError, OptionError
from tnlm.evaluation import speed
from tnlm.layers.machine import Machine, key_of
from tnlm.layers.prices import Prices

TIMES = Machine(1e-9, 1e-9, (1e-9,) * 5, 1e-12, (1e-15,) * 4, True)
OWN = key_of(torch.float32, "cpu", torch.get_num_threads())
OTHER = f"far CPU torch 9 cpu {torch.get_num_threads()} threads torch.float32"
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 16, "num_samples": 4}
ASKED = {"keep_targets": 0.7, "unit": "time", "progress": False, **DATA}


@pytest.fixture(autouse=True)
def prices(monkeypatch):
    """Give made-up prices, and a dense model that takes a millisecond."""
    monkeypatch.setattr(clocked, "own_prices", lambda dtype, device: Prices(OWN, TIMES))
    monkeypatch.setattr(speed, "timed_decoding", lambda model, prompt, steps: (2e-3, 4e-3))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(Prices(OTHER, TIMES).to_dict()))
    return path


def test_a_budget_in_time_is_met_and_reported(tiny_llama):
    model = tnlm.compress(tiny_llama(), "auto", **ASKED)
    report = tnlm.report(model)
    plan = report.plan
    before, after = plan.targets_before.time, plan.targets_after.time
    assert 0.5 * before < after <= 0.7 * before
    assert plan.request["workload"] == "decode:1"
    assert plan.request["prices"] == Prices(OWN, TIMES).to_dict()
    assert plan.model.time == 10**6  # measured
    assert plan.model_after.time == 10**6 - before + after
    text = str(report)
    assert f"pass:    decode:1, predicted for {OWN}" in text
    assert "time 1.000 ms -> " in text
    values = report.to_dict()
    assert values["target_nanoseconds_before"] == before
    assert values["nanoseconds_after"] == plan.model_after.time
    assert type(report).from_json(report.to_json()).plan == plan


def test_time_of_the_whole_model_is_kept_too(tiny_llama):
    asked = {**ASKED, "keep_targets": None, "keep": 0.999}
    plan = tnlm.plan(tiny_llama(), "auto", workload="prefill:32", **asked)
    assert plan.model.time == 2 * 10**6
    assert plan.model_after.time <= 0.999 * plan.model.time
    with pytest.raises(BudgetError, match=r"keep=0\.1 of 2,000,000 nanoseconds, but .* lie"):
        tnlm.plan(tiny_llama(), "auto", workload="prefill:32", **{**asked, "keep": 0.1})


@pytest.mark.parametrize(("seconds", "turns"), [(0.05, 12), (2.0, 3)])
def test_other_work_in_the_first_turns_does_not_move_the_dense_time(
    tiny_llama, monkeypatch, seconds, turns
):
    taken = []

    def timed(_model, _prompt, _steps):
        taken.append(4 * seconds * (2 if len(taken) < 2 else 1))
        return 0.0, taken[-1]

    monkeypatch.setattr(speed, "timed_decoding", timed)
    monkeypatch.setattr(clocked.time, "perf_counter", lambda: sum(taken))
    plan = tnlm.plan(tiny_llama(), "auto", **ASKED)
    assert plan.model.time == pytest.approx(1e9 * seconds)
    assert len(taken) == turns


def test_a_plan_that_is_carried_out_keeps_its_prices(tiny_llama, file, caplog):
    decided = tnlm.plan(tiny_llama(), "auto", prices=file, **ASKED)
    assert decided.model.time == decided.model_after.time == 0  # unknown there
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tnlm"):
        model = tnlm.compress(tiny_llama(), decided, progress=False, **DATA)
    assert f"the plan's times are those of {OTHER}" in caplog.text
    plan = tnlm.report(model).plan
    assert plan.targets_after == decided.targets_after
    assert plan.targets_before == decided.targets_before
    broken = tnlm.Plan.from_json(decided.to_json().replace("column_major", "major"))
    with pytest.raises(OptionError, match="the plan's prices cannot be read"):
        tnlm.compress(tiny_llama(), broken, progress=False, **DATA)


def test_a_plan_for_another_number_of_threads_warns(tiny_llama, caplog):
    decided = tnlm.plan(tiny_llama(), "auto", **ASKED)
    threads = torch.get_num_threads()
    planned = OWN.replace(f" {threads} threads", f" {threads + 1} threads")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tnlm"):
        tnlm.compress(tiny_llama(), decided, progress=False, **DATA)
        assert "threads" not in caplog.text
        other = tnlm.Plan.from_json(decided.to_json().replace(OWN, planned))
        tnlm.compress(tiny_llama(), other, progress=False, **DATA)
    assert f"are those of {planned}, not of this machine with its {threads} threads" in caplog.text


def test_a_plan_for_a_device_that_is_not_here_warns(tiny_llama, file, caplog, monkeypatch):
    decided = tnlm.plan(tiny_llama(), "auto", prices=file, **ASKED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = OTHER.replace(" cpu ", " cuda ")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tnlm"):
        plan = tnlm.Plan.from_json(decided.to_json().replace(OTHER, there))
        tnlm.compress(tiny_llama(), plan, progress=False, **DATA)
    assert f"the plan's times are those of {there}" in caplog.text
    broken = tnlm.Plan.from_json(decided.to_json().replace(OTHER, "my laptop"))
    with pytest.raises(OptionError, match="cannot be read: 'my laptop' does not end with"):
        tnlm.compress(tiny_llama(), broken, progress=False, **DATA)


def test_keep_needs_the_time_of_the_whole_model(tiny_llama, file):
    asked = {**ASKED, "keep_targets": None, "keep": 0.9}
    with pytest.raises(BudgetError, match=f"those of {OTHER}; use keep_targets"):
        tnlm.plan(tiny_llama(), "auto", prices=file, **asked)
    with pytest.raises(BudgetError, match=r"600 positions, but the model has .* use keep_targets"):
        tnlm.plan(tiny_llama(), "auto", workload="prefill:600", **asked)


def test_a_model_without_tokens_has_times_of_its_targets():
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**small, intermediate_size=16, image_size=8, patch_size=4))
    given = {"metric": "identity", "formats": ("low-rank",), "allocation": "energy"}
    scheme = tnlm.scheme("svd", **given)
    plan = tnlm.plan(model, scheme, unit="time", keep_targets=0.8, progress=False)
    assert 0 < plan.targets_after.time <= 0.8 * plan.targets_before.time
    assert plan.model.time == 0


def refused(model, scheme, **given):
    with pytest.raises(OptionError) as caught:
        tnlm.plan(model, scheme, progress=False, **given)
    return str(caught.value)


def test_what_has_no_effect_or_no_prediction_is_refused(tiny_llama, file):
    model = tiny_llama()
    assert "workload= has no effect with unit='params'" in refused(
        model, "auto", workload="decode", **DATA
    )
    assert "prices= has no effect with unit='macs'" in refused(
        model, "svd", prices=file, unit="macs"
    )
    assert "unit='time' with precision='int8'" in refused(
        model, "auto", precision="int8", unit="time", **DATA
    )
    assert "workload='chat'; allowed: decode" in refused(
        model, "auto", workload="chat", unit="time", **DATA
    )
    assert "unit='time' with allocation='uniform'" in refused(model, "svd", unit="time")


def test_targets_of_two_dtypes_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].double()
    assert "targets in torch.float32 on cpu, torch.float64 on cpu" in refused(
        model, "svd", allocation="energy", unit="time"
    )
