from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnlm
from tnlm.calibration import store
from tnlm.errors import CalibrationError, EvaluationError, ModelError, OptionError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.studies.analysis.groups import Truncation
from tnlm.studies.analysis.truncation import GroupRow, _correlated
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.selection import select

IDS = torch.arange(128) % 61 + 3
FISHER = {"weighting": "fwsvd", "calibration": IDS, "max_length": 16, "gradient_samples": 4}


def truncate(model, score, **arguments):
    return tnlm.truncate_groups(model, score, progress=False, **arguments)


def energy_of(model):
    return sum(float(t.weight(model).double().square().sum()) for t in select(model).targets)


def state_of(model):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    return weights, flags, grads, torch.get_rng_state()


def assert_same(before, after):
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


def single(weight):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight = nn.Parameter(weight.clone())
    return model, MatrixTarget("0", "0", tuple(weight.shape))


@given(
    out=st.integers(3, 20),
    inner=st.integers(3, 20),
    groups=st.integers(1, 3),
    weighted=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_groups_partition_the_energy(out, inner, groups, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, inner, generator=generator, dtype=torch.float64)
    scale = torch.rand(inner, generator=generator, dtype=torch.float64) + 0.1
    metric = Metric(inputs=Side(scale)) if weighted else Metric()
    model, target = single(weight)
    lost = total = torch.zeros(out, inner, dtype=torch.float64)
    squares = []
    with Truncation(model, [target], lambda _: metric, groups, progress=False) as cut:
        for group in range(groups):
            cut.drop(group)
            lost = weight - model[0].weight.detach()
            squares.append(float(lost.square().sum()))
            assert squares[-1] == pytest.approx(float(cut.energy[group]), rel=1e-6, abs=1e-9)
            weighed = metric.norm(lost) ** 2
            assert weighed == pytest.approx(float(cut.weighted[group]), rel=1e-6, abs=1e-9)
            total = total + lost
    torch.testing.assert_close(total, weight)
    assert sum(squares) == pytest.approx(float(weight.square().sum()))
    size = min(out, inner)
    counts = [size * (g + 1) // groups - size * g // groups for g in range(groups)]
    means = [float(e) / count for e, count in zip(cut.weighted, counts, strict=True)]
    assert means == sorted(means, reverse=True)
    assert torch.equal(model[0].weight, weight)


def test_a_group_is_its_singular_values(gaussian):
    weight = gaussian(10, 14)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    model, target = single(weight)
    with Truncation(model, [target], lambda _: Metric(), 3, progress=False) as cut:
        for group, part in enumerate((slice(0, 3), slice(3, 6), slice(6, 10))):
            cut.drop(group)
            expected = weight - (u[:, part] * s[part]) @ vh[part]
            torch.testing.assert_close(model[0].weight.detach(), expected)


def test_a_weighted_group_is_of_the_weighed_matrix(gaussian):
    weight, scale = gaussian(10, 6), gaussian(6).square() + 0.1
    root = scale.sqrt()
    u, s, vh = torch.linalg.svd(weight * root, full_matrices=False)
    model, target = single(weight)
    metric = Metric(inputs=Side(scale))
    with Truncation(model, [target], lambda _: metric, 2, progress=False) as cut:
        cut.drop(1)
        expected = weight - (u[:, 3:] * s[3:]) @ vh[3:] / root
        torch.testing.assert_close(model[0].weight.detach(), expected)


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2", "masked-bert"])
@pytest.mark.parametrize("weighting", ["svd", "fwsvd"])
def test_the_model_is_measured_and_left_as_it_was(kind, weighting, make_model):
    model = make_model(kind).train()
    before, energy = state_of(model), energy_of(model)
    arguments = FISHER if weighting == "fwsvd" else {}
    found = truncate(model, energy_of, groups=5, higher_is_better=True, **arguments)
    assert_same(before, state_of(model))
    assert [row.group for row in found.rows] == [1, 2, 3, 4, 5]
    assert found.dense == pytest.approx(energy)
    for row in found.rows:
        assert row.loss == pytest.approx(row.error**2 * energy, rel=1e-4)
        assert row.value == pytest.approx(energy - row.loss)
    assert sum(row.error**2 for row in found.rows) == pytest.approx(1.0)
    assert sum(row.weighted_error**2 for row in found.rows) == pytest.approx(1.0)
    assert found.spearman == pytest.approx(1.0)


def test_bfloat16_weights_come_back_bit_for_bit(make_model):
    model = make_model("gpt2").to(torch.bfloat16)
    before = state_of(model)
    truncate(model, energy_of, groups=3)
    assert_same(before, state_of(model))


def test_weights_wait_in_files_when_memory_is_short(make_model, monkeypatch):
    expected = truncate(make_model("gpt2"), energy_of, groups=3)
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    model = make_model("gpt2")
    before = state_of(model)
    assert truncate(model, energy_of, groups=3) == expected
    assert_same(before, state_of(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_metric_leaves_the_model_as_it_was(error, make_model):
    model = make_model("gpt2").train()
    before, calls = state_of(model), []

    def metric(measured):
        measured.eval()
        calls.append(energy_of(measured))
        if len(calls) == 3:
            raise error("stop")
        return calls[-1]

    with pytest.raises(error, match="stop"):
        truncate(model, metric)
    assert len(set(calls)) == 3
    assert_same(before, state_of(model))


def test_a_failure_while_weights_change_is_undone(make_model, monkeypatch):
    model = make_model("llama")
    before, targets = state_of(model), select(model).targets
    first, last = targets[0].weight(model), targets[-1].name
    dense, read, changed = first.clone(), store.Statistics.tensor, []

    def fail(self, module, name):
        if module == last and name == "basis":
            changed.append(not torch.equal(first, dense))
            raise OSError("the disk is gone")
        return read(self, module, name)

    monkeypatch.setattr(store.Statistics, "tensor", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        truncate(model, energy_of)
    assert changed == [True]
    assert_same(before, state_of(model))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the score of the whole model is nan, not a finite number"),
        (None, "the score of the whole model is a NoneType; it must be a number"),
        ("much", "the score of the whole model is 'much'; it must be a number"),
    ],
)
def test_a_metric_gives_a_finite_number(value, message, make_model):
    with pytest.raises(EvaluationError, match=message):
        truncate(make_model("llama"), lambda _: value)


def test_the_group_without_a_finite_value_is_named(make_model):
    values = iter([1.0, 2.0, float("inf")])
    model = make_model("llama")
    before = state_of(model)
    with pytest.raises(EvaluationError, match="the model without group 2 is inf"):
        truncate(model, lambda _: next(values))
    assert_same(before, state_of(model))


def test_a_constant_metric_has_no_correlation(make_model):
    found = truncate(make_model("llama"), lambda _: 0.5, groups=4)
    assert found.spearman is None
    assert found.weighted_spearman is None
    assert found.note == "none: the score is the same whichever group is removed"
    assert str(found).count(found.note) == 2
    assert json.loads(found.to_json())["spearman"] is None


def test_one_group_has_no_correlation(make_model):
    found = truncate(make_model("llama"), energy_of, groups=1)
    assert found.note == "none: there is only one group"
    assert found.rows[0].value == pytest.approx(0.0, abs=1e-6)


def test_ranks_alone_make_the_correlation():
    rows = tuple(
        GroupRow(i + 1, error, 1.0, 0.0, loss)
        for i, (error, loss) in enumerate([(9.0, 3.0), (1.0, 2.0), (0.5, 100.0)])
    )
    found = _correlated(rows, "svd", 0.0)
    assert found.spearman == pytest.approx(-0.5)
    assert found.weighted_spearman is None
    assert "all groups have the same error" in str(found)


def test_perplexity_of_text_is_that_of_the_library(make_model, word_tokenizer, word_text):
    model, text = make_model("llama"), word_text(100)
    options = {"window": 16, "windows": 4}
    expected = tnlm.perplexity(model, text, word_tokenizer, **options).perplexity
    for metric in (text, [text]):
        found = truncate(model, metric, groups=2, tokenizer=word_tokenizer, **options)
        assert found.dense == pytest.approx(expected)
        assert found.rows[0].loss == found.rows[0].value - found.dense
    ids = word_tokenizer(text)["input_ids"]
    for metric in (ids, torch.tensor(ids)):
        found = truncate(model, metric, groups=2, **options)
        assert found.dense == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_ids_needs_a_head(make_model):
    with pytest.raises(EvaluationError, match="BertModel has no head over its vocabulary"):
        truncate(make_model("bert"), IDS, window=16)
    with pytest.raises(EvaluationError, match="nothing to predict"):
        truncate(make_model("llama"), [[3], [4]], window=16)
    with pytest.raises(EvaluationError, match="window=512, but the model has 128 positions"):
        truncate(make_model("llama"), IDS)


def test_options_are_checked_before_any_work(make_model, monkeypatch):
    model = make_model("llama")
    with pytest.raises(OptionError, match="weighting='fsvd'; did you mean"):
        truncate(model, energy_of, weighting="fsvd")
    with pytest.raises(OptionError, match=r"groups=33, but .*q_proj has 32 singular values"):
        truncate(model, energy_of, groups=33, ignore=["k_proj", "v_proj"])
    for groups in (0, True, 2.0):
        with pytest.raises(OptionError, match=r"groups=.*; allowed: a whole number of at least 1"):
            truncate(model, energy_of, groups=groups)
    with pytest.raises(OptionError, match="higher_is_better=True needs a function"):
        truncate(model, IDS, higher_is_better=True)
    for window in (0, True):
        with pytest.raises(OptionError, match=f"window={window}; allowed"):
            truncate(model, IDS, window=window)
    with pytest.raises(OptionError, match="score is a float; allowed: a function"):
        truncate(model, 3.0)
    with pytest.raises(CalibrationError, match=r"scheme 'fwsvd' .* needs data"):
        truncate(model, energy_of, weighting="fwsvd")
    with pytest.raises(OptionError, match="calibration= has no effect on scheme 'svd'"):
        truncate(model, energy_of, calibration=IDS)


def test_other_models_are_refused(compressed):
    with pytest.raises(ModelError, match="compressed already"):
        truncate(compressed("llama", "svd"), energy_of)
    with pytest.raises(ModelError, match="PreTrainedModel is wanted, not Linear"):
        truncate(nn.Linear(2, 2), energy_of)
