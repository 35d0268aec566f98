from __future__ import annotations

import dataclasses

import pytest
import torch

import tnlm
from tnlm.calibration.store import Statistics
from tnlm.compression.job import Data, Job, prepare
from tnlm.compression.request import make_request
from tnlm.errors import CalibrationError, OptionError, TargetError
from tnlm.metrics.named import FISHER, GRADIENTS, INPUTS, LORA, MEASURES, MOVEMENT
from tnlm.targets.base import Target
from tnlm.targets.channels import FeedForward
from tnlm.targets.selection import Selection

IDS = torch.arange(256) % 61 + 3
DATA = Data(IDS, None, 4, 32, None, 0, 2)
OUT, IN = 4, 3
INPUTS_OF = ("moment", "mean", "magnitude")
TARGET = Target("a.q", "a.q", "linear", (OUT, IN))


def request(scheme="svd", **arguments):
    return make_request(scheme, options=arguments.pop("options", {}), **arguments)


def prepared(model, scheme="svd", data=DATA, targets=None, **arguments):
    return prepare(model, request(scheme, **arguments), targets, None, data, False)


def job_of(metric, gaussian, *, silent=(), allocation="loss", **changes):
    """A job on one matrix with statistics made up for it."""
    x, g = gaussian(20, IN) + 1.0, 0.01 * gaussian(20, OUT, seed=1)
    found = {
        "moment": x.T @ x / 20,
        "mean": x.mean(0),
        "magnitude": x.abs().mean(0),
        "gradient": g.T @ g / 20,
        "fisher": 1e-4 * gaussian(OUT, IN, seed=2).square().float(),
    } | changes
    found["lora_inputs"] = found["fisher"].double().sum(0)
    found["lora_outputs"] = found["fisher"].double().sum(1)
    found["movement"] = found["lora_inputs"].clone()
    for name in silent:
        found[name] = torch.zeros_like(found[name])
    stores = []
    for names in (INPUTS_OF, ("gradient", "fisher"), ("lora_inputs", "lora_outputs")):
        store = Statistics(tokens=20)
        store.put("a.q", ["a.q"], {name: found[name] for name in names})
        stores.append(store)
    asked = request(metric=metric, allocation=allocation)
    given = dict(zip(("inputs", "gradients", "loras"), stores, strict=True))
    given["movement"] = {TARGET.name: found["movement"]}
    return Job(asked, Selection([TARGET]), [TARGET], **given), found


def effect(job, error):
    return job.metric(TARGET).norm(error) ** 2 * job.importance(TARGET)


def test_the_importance_of_every_measure_is_its_formula(gaussian):
    for name in MEASURES:
        job, found = job_of(name, gaussian)
        g, c = (float(found[k].diagonal().mean()) for k in ("gradient", "moment"))
        expected = dict.fromkeys(MEASURES, 1.0)
        expected |= {"identity": g * c, "diagonal": g * c / float(found["magnitude"].mean())}
        expected |= dict.fromkeys(("input", "covariance", "centered"), g)
        expected["fisher-elements"] = float(found["fisher"].mean())
        weight = float(found["lora_inputs"].mean())
        expected |= {name: g * c / weight for name in MEASURES if name.startswith("lora")}
        expected["pruned"] = g * c
        expected["movement"] = g * c / float(found["movement"].mean())
        assert job.importance(TARGET) == pytest.approx(expected[name]), name


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
    job, _ = job_of(name, gaussian, **even)
    error = gaussian(OUT, IN, seed=5)
    assert effect(job, error) == pytest.approx(2.25 * float(error.square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_harm_follows_the_scale_of_the_data(name, scale, gaussian):
    plain, found = job_of(name, gaussian)
    error = gaussian(OUT, IN, seed=5)
    powers = {"moment": 2, "mean": 1, "magnitude": 1, "fisher": 2}
    louder = {key: found[key] * scale**power for key, power in powers.items()}
    loud, _ = job_of(name, gaussian, **louder)
    assert effect(loud, error) == pytest.approx(scale**2 * effect(plain, error), rel=1e-4)


@pytest.mark.parametrize("name", MEASURES)
def test_what_never_acts_on_the_loss_has_no_importance(name, gaussian):
    needs = MEASURES[name].needs
    for silent in (("fisher",), ("gradient",), ("moment", "mean", "magnitude")):
        job, _ = job_of(name, gaussian, silent=silent)
        reads_fisher = FISHER in needs
        assert (job.importance(TARGET) == 0.0) == (reads_fisher == (silent == ("fisher",)))
        assert job.metric(TARGET).norm(torch.ones(OUT, IN)) > 0


def test_without_gradients_all_count_the_same(gaussian):
    for name in ("identity", "input", "diagonal"):
        job, _ = job_of(name, gaussian, allocation="energy")
        job.gradients = None
        assert job.importance(TARGET) == 1.0


@pytest.mark.parametrize("name", MEASURES)
def test_a_model_gives_every_measure_what_it_needs(name, tiny_llama):
    model = tiny_llama()
    few = {"recover_tokens": 256} if name in ("movement", "pruned") else {}
    job = prepared(model, metric=name, allocation="loss", targets=["q_proj", "up_proj"], **few)
    needs = job.request.needs
    assert (job.inputs is not None) == (INPUTS in needs)
    assert (job.loras is not None) == (LORA in needs)
    assert bool(job.movement) == (job.source is not None) == (MOVEMENT in needs)
    assert (job.gradients is not None) == bool(needs & {GRADIENTS, FISHER})
    assert len(job.units) == 4
    for target in job.units:
        weight = target.weight(model)
        importance, size = job.importance(target), job.metric(target).norm(weight)
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
        metric, rows = job.metric(target), slice(32 * target.part, 32 * target.part + 32)
        if name == "fisher-elements":
            fisher = job.gradients.tensor(target.module, "fisher")[rows].double()
            torch.testing.assert_close(metric.weights, (fisher / fisher.mean()).clamp_min(1e-6))
            assert job.importance(target) == pytest.approx(float(fisher.mean()), rel=1e-5)
        elif name == "two-sided":
            gradient = job.gradients.tensor(target.module, "gradient")[rows, rows]
            off = metric.outputs.values - metric.outputs.values.diagonal().diag()
            torch.testing.assert_close(off, 0.7 * (gradient - gradient.diagonal().diag()))
        else:
            assert metric is job.metric(parts[0])  # one input, one root


def test_the_latest_metric_is_kept_until_it_is_forgotten(gaussian):
    job, found = job_of("input", gaussian)
    first = job.metric(TARGET)
    assert job.metric(TARGET) is first
    newer = job.metric(TARGET, {"moment": 4.0 * found["moment"]})
    error = torch.ones(OUT, IN)
    assert newer.norm(error) == pytest.approx(2.0 * first.norm(error))
    assert job.metric(TARGET) is first
    job.forget()
    assert job.metric(TARGET) is not first


def test_newer_statistics_replace_only_what_they_hold(gaussian):
    job, found = job_of("two-sided", gaussian)
    newer = job.metric(TARGET, {"moment": torch.eye(IN).double()})
    torch.testing.assert_close(newer.outputs.values, job.metric(TARGET).outputs.values)
    torch.testing.assert_close(newer.inputs.values, torch.eye(IN).double())
    assert found["moment"].shape == (IN, IN)


def test_a_pair_is_weighed_as_its_reader_is(tiny_llama):
    job = prepared(tiny_llama(), "auto")
    assert len(job.joint) == 2
    for unit in job.joint:
        assert isinstance(unit, FeedForward)
        own, reader = job.metric(unit), job.metric(unit.reader)
        torch.testing.assert_close(own.outputs.values, reader.inputs.values)
        torch.testing.assert_close(own.inputs.values, reader.outputs.values)
        assert job.importance(unit) == job.importance(unit.reader)
    assert not prepared(tiny_llama(), "svd-llm").joint


@pytest.mark.parametrize("name", ["input", "two-sided", "fisher-both", "diagonal"])
def test_a_stack_is_weighed_as_its_members_are(name, tiny_llama):
    job = prepared(tiny_llama(), metric=name, allocation="loss", share=2, targets=["q_proj"])
    (unit,) = job.units
    assert unit.shape == (64, 32)
    metric = job.metric(unit)
    if name == "input":
        moments = [job.inputs.tensor(m.module, "moment") for m in unit.members]
        mean = torch.stack(moments).mean(0)
        torch.testing.assert_close(metric.inputs.values, mean, rtol=1e-4, atol=1e-5)
    if name == "two-sided":
        assert float(metric.outputs.values[:32, 32:].abs().max()) == 0.0
    if name == "fisher-both":
        fisher = torch.cat([job.gradients.tensor(m.module, "fisher") for m in unit.members])
        torch.testing.assert_close(
            metric.outputs.values, fisher.double().mean(1), rtol=1e-4, atol=0
        )
    assert job.importance(unit) > 0


def test_statistics_that_were_not_gathered_are_named(gaussian):
    job, _ = job_of("two-sided", gaussian)
    job.gradients = None
    with pytest.raises(CalibrationError, match=r"gradient of a\.q was not gathered"):
        job.metric(TARGET)


def test_gradients_take_few_of_the_samples(tiny_llama):
    job = prepared(tiny_llama(), metric="two-sided", targets=["q_proj"])
    assert job.inputs.tokens == 4 * 32
    assert job.gradients.tokens == 2 * 32
    assert job.batches == ()  # nothing later needs them


def test_a_cascade_or_tuning_keeps_the_batches(tiny_llama):
    model = tiny_llama()
    assert len(prepared(model, metric="input", cascade="sequential").batches) == 4
    assert len(prepared(model, refine=8).batches) == 4


@pytest.mark.parametrize(
    ("scheme", "metric", "store", "name"),
    [
        ("svd-llm", "two-sided", "gradients", "gradient"),
        ("lora-svd", "lora-fisher", "loras", "lora_inputs"),
        ("svd", "lora-both", "loras", "lora_outputs"),
    ],
)
def test_the_seed_reaches_labels_and_the_start_of_a_lora(
    scheme, metric, store, name, tiny_llama, tmp_path
):
    def found(seed, cache=None):
        data = dataclasses.replace(DATA, num_samples=8, seed=seed, cache_dir=cache)
        job = prepared(tiny_llama(), scheme, data, ["up_proj"], metric=metric)
        return job, getattr(job, store).tensor("model.layers.1.mlp.up_proj", name)

    (job, first), (other, second) = found(0), found(1)
    assert job.fingerprint == other.fingerprint  # all windows are taken: only the draws differ
    assert not torch.equal(first, second)
    cached = [found(seed, tmp_path)[1] for seed in (0, 1, 0, 1)]
    for seed, tensor in enumerate(cached):
        assert torch.equal(tensor, (first, second)[seed % 2])


def test_the_seed_reaches_tuning(make_model):
    def tuned(seed):
        options = {"calibration": IDS, "max_length": 32, "keep_targets": 0.5, "progress": False}
        model = tnlm.compress(make_model("llama"), "svd-llm", refine=256, seed=seed, **options)
        return [tensor.clone() for tensor in model.state_dict().values()]

    first, again, other = tuned(0), tuned(0), tuned(1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_gradient_samples_are_counted(value, tiny_llama):
    data = dataclasses.replace(DATA, gradient_samples=value)
    with pytest.raises(OptionError, match=r"gradient_samples=.*; allowed: a number >= 1"):
        prepared(tiny_llama(), data=data, metric="two-sided")


def test_data_is_asked_for_where_it_is_needed_and_refused_where_not(tiny_llama):
    model, nothing = tiny_llama(), dataclasses.replace(DATA, calibration=None)
    for arguments in ({"metric": "input"}, {"allocation": "loss"}, {"refine": 8}):
        with pytest.raises(CalibrationError, match="looks at data; pass calibration="):
            prepared(model, data=nothing, **arguments)
    with pytest.raises(OptionError, match="calibration= has no effect on scheme 'svd'"):
        prepared(model)
    cached = Data(cache_dir="somewhere")
    with pytest.raises(OptionError, match="cache_dir= has no effect on scheme 'svd'"):
        prepared(model, data=cached)


def test_targets_that_cannot_be_served_are_passed_over_with_the_reason(make_model):
    model = make_model("tied-llama")
    job = prepared(model, metric="input", targets=["q_proj", "embed_tokens"])
    assert job.selection.skipped == {
        "model.embed_tokens": "an embedding has no input to measure; use metric='identity'"
    }
    assert all(target.kind == "linear" for target in job.units)
    nothing = Data()
    with pytest.raises(TargetError, match="no target is left for scheme 'tensorgpt'"):
        prepared(model, "tensorgpt", data=nothing, targets=["q_proj"])
