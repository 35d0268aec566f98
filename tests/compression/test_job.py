from __future__ import annotations

import pytest
import torch

import tnlm
from tnlm.compression.choices import Calibration
from tnlm.compression.gatherers import gatherers
from tnlm.compression.job import prepare
from tnlm.compression.request import make_request
from tnlm.errors import CalibrationError, OptionError, TargetError
from tnlm.metrics.measure import MOVEMENT
from tnlm.metrics.named import measures
from tnlm.targets.channel_ranks import RankedFeedForward
from tnlm.targets.channels import FeedForward
from tnlm.targets.heads import Attention
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.table import TableTarget

# Only some formats, and one allocation, can be fitted under the others.
SPECIAL = ("experts", "tokens", "surgery")
MEASURES = {n: m for n, m in measures().items() if m.form not in SPECIAL}

IDS = torch.arange(256) % 61 + 3
DATA = Calibration(IDS, num_samples=4, max_length=32, gradient_samples=2)
OUT, IN = 4, 3
INPUTS_OF = ("moment", "mean", "magnitude")
TARGET = MatrixTarget("a.q", "a.q", (OUT, IN))


def request(scheme="svd", **arguments):
    return make_request(scheme, **arguments)


def tensor(job, module, name):
    return job.evidence.sources[name].store.tensor(module, name)


def prepared(model, scheme="svd", data=DATA, targets=None, **arguments):
    return prepare(model, request(scheme, **arguments), targets, None, data, False)


@pytest.mark.parametrize("name", MEASURES)
def test_a_model_gives_every_measure_what_it_needs(name, tiny_llama):
    model = tiny_llama()
    few = {"recover_tokens": 256} if name in ("movement", "pruned") else {}
    job = prepared(model, metric=name, allocation="loss", targets=["q_proj", "up_proj"], **few)
    needs = job.request.needs
    statistics = {name for each in gatherers() if each.name in needs for name in each.statistics}
    assert job.evidence.sources.keys() == statistics
    assert (job.evidence.source is not None) == (MOVEMENT in needs or name == "lora-kept")
    assert len(job.units) == 4
    for target in job.units:
        weight = target.weight(model)
        importance, size = job.evidence.importance(target), job.evidence.metric(target).norm(weight)
        assert 0 < importance < float("inf")
        assert 0 < size < float("inf")
    assert "calibrate" in job.seconds


@pytest.mark.parametrize("name", ["input", "two-sided", "fisher-elements"])
def test_parts_of_a_fused_module_take_their_own_rows(name, make_model):
    model = make_model("gpt2")
    job = prepared(model, metric=name, allocation="loss", targets=["c_attn"])
    parts = [target for target in job.units if target.module.endswith("h.0.attn.c_attn")]
    assert [target.part for target in parts] == [0, 1, 2]
    for target in parts:
        metric, rows = job.evidence.metric(target), slice(32 * target.part, 32 * target.part + 32)
        if name == "fisher-elements":
            fisher = tensor(job, target.module, "fisher")[rows].double()
            torch.testing.assert_close(metric.weights, (fisher / fisher.mean()).clamp_min(1e-6))
            assert job.evidence.importance(target) == pytest.approx(float(fisher.mean()), rel=1e-5)
        elif name == "two-sided":
            gradient = tensor(job, target.module, "gradient")[rows, rows]
            off = metric.outputs.values - metric.outputs.values.diagonal().diag()
            torch.testing.assert_close(off, 0.7 * (gradient - gradient.diagonal().diag()))
        else:
            assert metric is job.evidence.metric(parts[0])  # one input, one root


def test_a_pair_is_weighed_as_its_reader_is(tiny_llama):
    job = prepared(tiny_llama(), tnlm.scheme("auto", formats=("low-rank", "channels", "heads")))
    assert [type(unit) for unit in job.joint] == [FeedForward] * 2 + [Attention] * 2
    for unit in job.joint:
        own, reader = job.evidence.metric(unit), job.evidence.metric(unit.consumer)
        torch.testing.assert_close(own.outputs.values, reader.inputs.values)
        torch.testing.assert_close(own.inputs.values, reader.outputs.values)
        assert job.evidence.importance(unit) == job.evidence.importance(unit.consumer)
    assert not prepared(tiny_llama(), "svd-llm").joint


@pytest.mark.parametrize("name", ["two-sided", "input"])
def test_errors_in_a_layer_add_up_by_their_effects_on_the_loss(name, tiny_llama):
    model = tiny_llama()
    job = prepared(model, "auto", metric=name)
    unit = next(unit for unit in job.joint if isinstance(unit, RankedFeedForward))
    error = torch.randn(unit.shape, dtype=torch.float64)
    apart = error.split(list(unit.sizes))
    members = (unit.consumer, *unit.producers)
    effects = [job.evidence.importance(member) for member in members]
    wanted = sum(
        effect * job.evidence.metric(member).norm(part if index == 0 else part.T) ** 2
        for index, (member, part, effect) in enumerate(zip(members, apart, effects, strict=True))
    )
    found = job.evidence.importance(unit) * job.evidence.metric(unit).norm(error) ** 2
    assert found == pytest.approx(wanted, rel=1e-9)
    assert name != "two-sided" or set(effects) == {1.0}


@pytest.mark.parametrize("name", ["input", "two-sided", "fisher-both", "diagonal"])
def test_a_stack_is_weighed_as_its_members_are(name, tiny_llama):
    job = prepared(tiny_llama(), metric=name, allocation="loss", share=2, targets=["q_proj"])
    (unit,) = job.units
    assert unit.shape == (64, 32)
    metric = job.evidence.metric(unit)
    if name == "input":
        moments = [tensor(job, m.module, "moment") for m in unit.members]
        mean = torch.stack(moments).mean(0)
        torch.testing.assert_close(metric.inputs.values, mean, rtol=1e-4, atol=1e-5)
    if name == "two-sided":
        assert float(metric.outputs.values[:32, 32:].abs().max()) == 0.0
    if name == "fisher-both":
        fisher = torch.cat([tensor(job, m.module, "fisher") for m in unit.members])
        torch.testing.assert_close(
            metric.outputs.values, fisher.double().mean(1), rtol=1e-4, atol=0
        )
    assert job.evidence.importance(unit) > 0


def test_gradients_take_few_of_the_samples(tiny_llama):
    job = prepared(tiny_llama(), metric="two-sided", targets=["q_proj"])
    assert job.evidence.inputs.tokens == 4 * 32
    assert job.evidence.sources["gradient"].store.tokens == 2 * 32
    assert job.evidence.batches == []  # nothing later needs them


def test_a_cascade_or_tuning_keeps_the_batches(tiny_llama):
    model = tiny_llama()
    assert len(prepared(model, metric="input", cascade="sequential").evidence.batches) == 4
    assert len(prepared(model, refine=8).evidence.batches) == 4


def test_data_is_asked_for_where_it_is_needed_and_refused_where_not(tiny_llama):
    model, nothing = tiny_llama(), Calibration()
    for arguments in ({"metric": "input"}, {"allocation": "loss"}, {"refine": 8}):
        with pytest.raises(CalibrationError, match="needs data; pass calibration="):
            prepared(model, data=nothing, **arguments)
    with pytest.raises(OptionError, match="calibration= has no effect on scheme 'svd'"):
        prepared(model)
    cached = Calibration(cache_dir="somewhere")
    with pytest.raises(OptionError, match="cache_dir= has no effect on scheme 'svd'"):
        prepared(model, data=cached)


def test_targets_that_cannot_be_served_are_passed_over_with_the_reason(make_model):
    model = make_model("tied-llama")
    job = prepared(model, metric="input", targets=["q_proj", "embed_tokens"])
    assert job.selection.skipped == {"model.embed_tokens": TableTarget.unmeasured}
    assert all(target.kind == "linear" for target in job.units)
    nothing = Calibration()
    with pytest.raises(TargetError, match="no target is left for scheme 'tensorgpt'"):
        prepared(model, "tensorgpt", data=nothing, targets=["q_proj"])
