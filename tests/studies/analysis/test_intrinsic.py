import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

import tnlm
from tnlm.errors import CheckpointError, EvaluationError, OptionError, TrainingError
from tnlm.studies.analysis.goals import Goal, goal_of
from tnlm.studies.analysis.intrinsic import intrinsic_dimension
from tnlm.studies.analysis.subspace_search import SubspaceRun, SubspaceSearch
from tnlm.studies.scores import measure

IDS = torch.arange(128) % 4 + 3
ROWS = [{"input_ids": [3 + i % 2] * (4 + i % 5), "label": i % 2} for i in range(16)]


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2):
    return tiny_gpt2(n_layer=1, n_embd=8, n_inner=16, n_head=2, vocab_size=12, n_positions=16)


@pytest.fixture(scope="module")
def classifier(tiny_bert):
    made = tiny_bert(num_hidden_layers=1, num_labels=2, hidden_size=16, intermediate_size=16).config
    torch.manual_seed(1)
    return BertForSequenceClassification(made).eval()


def find(model, data=IDS, **given):
    quick = {"steps": 10, "learning_rate": 1e-2, "batch_size": 4, "max_length": 16}
    return intrinsic_dimension(model, data, **(quick | {"progress": False} | given))


def loss_of(model, ids):
    rows = ids.reshape(-1, 16)
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["did", "said"])
def test_a_language_model_is_searched(kind, gpt2):
    before, random = state(gpt2), torch.get_rng_state()
    found = find(gpt2, kind=kind, threshold=0.6, seeds=3)
    low, high = found.interval
    assert low <= found.dimension <= high
    assert sorted(found.by_seed)[1] == found.dimension
    assert found.full < found.target < found.start
    assert found.target == pytest.approx(found.start + 0.6 * (found.full - found.start))
    assert found.scales == (4 if kind == "said" else 0)
    assert found.parameters == sum(p.numel() for p in gpt2.parameters())
    assert {run.seed for run in found.runs} == {0, 1, 2}
    for seed, at in enumerate(found.by_seed):
        scores = {run.d: run.score for run in found.runs if run.seed == seed}
        assert scores[at] <= found.target
        assert all(score > found.target for d, score in scores.items() if d < at)
    assert same(gpt2, before)
    assert not gpt2.training
    assert torch.equal(torch.get_rng_state(), random)
    assert json.loads(found.to_json())["dimension"] == found.dimension
    assert f"d60 = {found.dimension}" in str(found)


def test_a_classifier_is_searched_by_accuracy(classifier):
    before = state(classifier)
    found = find(classifier, ROWS, score="accuracy", dims=[16, 256], learning_rate=[1e-3, 5e-3])
    assert found.full == 1.0
    assert found.target == pytest.approx(0.9)
    assert set(found.by_seed) <= {16, 256}
    assert len(found.runs) == 6  # every size for every seed
    assert same(classifier, before)


def test_a_callable_scores_the_trained_model_on_what_is_held_out(classifier):
    seen = []

    def confidence(model):
        assert not model.training
        seen.append(model)
        logits = model(input_ids=torch.tensor([[3] * 6, [4] * 6])).logits.softmax(-1)
        return float(logits.diagonal().mean())

    found = find(classifier, ROWS, score=confidence, dims=[300], learning_rate=5e-3, steps=30)
    assert all(model is classifier for model in seen)
    assert len(seen) == 1 + 3 + 3
    assert found.score == "confidence"


def test_scores_are_measured_on_what_is_held_out(gpt2):
    held = IDS[2:34]
    one, other = (find(gpt2, held_out=h, dims=[700], threshold=0.1) for h in (None, held))
    assert one.start == pytest.approx(loss_of(gpt2, IDS))
    assert other.start == pytest.approx(loss_of(gpt2, held))


def test_fewer_than_three_seeds_are_refused(gpt2):
    for seeds in (2, [1, 2], [1, 1, 1], 0):
        with pytest.raises(OptionError, match="allowed: at least 3 different ones"):
            find(gpt2, seeds=seeds)


def test_seeds_may_be_named(gpt2):
    found = find(gpt2, seeds=[5, 6, 9], dims=[700], threshold=0.2)
    assert [run.seed for run in found.runs] == [5, 6, 9]
    assert found.interval == (1, 700)


def test_said_leaves_room_for_its_scales(gpt2):
    with pytest.raises(OptionError, match=r"dims with d=4; allowed: a whole number from 5 to"):
        find(gpt2, kind="said", dims=[4])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dims": [10**9]}, "dims with d=1000000000; allowed: a whole number from 1 to"),
        ({"dims": []}, r"dims=\[\]; give the values"),
        ({"dims": [2.5]}, "dims with d=2.5"),
        ({"threshold": 0.0}, "threshold=0.0; allowed: above 0, at most 1"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"kind": "dod"}, "kind='dod'; did you mean 'did'"),
        ({"projection": "sparse"}, "projection='sparse'"),
        ({"score": "los"}, "score='los'; did you mean 'loss'.*or a callable"),
        ({"score": "accuracy"}, "score='accuracy' needs a classifier, but the model is a causal"),
        ({"threshold": True}, "threshold=True"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"learning_rate": True}, "learning_rate=True"),
        ({"learning_rate": []}, r"learning_rate=\[\]"),
        ({"learning_rate": [1e-3, 0.0]}, "learning_rate=0.0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_impossible_choices_are_refused(given, message, gpt2):
    with pytest.raises(OptionError, match=message):
        find(gpt2, **given)


@pytest.mark.parametrize("data", [[], torch.zeros(0, dtype=torch.int64), [[]]])
def test_no_data_is_refused(data, gpt2):
    with pytest.raises(TrainingError, match="has no tokens"):
        find(gpt2, data)


def test_a_constant_metric_is_refused(gpt2):
    before = state(gpt2)
    with pytest.raises(EvaluationError, match=r"from 0.5 to 0.5, which is no improvement"):
        find(gpt2, score=lambda model: 0.5)
    assert same(gpt2, before)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "0.5", True])
def test_a_score_that_is_no_number_is_refused(score, gpt2):
    before = state(gpt2)
    with pytest.raises(
        EvaluationError, match=r"of GPT2LMHeadModel is .*(not a finite|must be a) number"
    ):
        find(gpt2, score=lambda model: score)
    assert same(gpt2, before)


def test_the_model_is_as_it_was_when_a_metric_fails(gpt2):
    before, calls = state(gpt2), []

    def fails(model):
        calls.append(model)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.1 * len(calls)

    with pytest.raises(KeyboardInterrupt):
        find(gpt2, score=fails)
    assert same(gpt2, before)
    assert not gpt2.training


def test_when_no_size_is_enough_every_score_is_kept(gpt2):
    found = find(gpt2, dims=[1, 2])
    assert found.dimension is None
    assert found.by_seed == (None, None, None)
    assert found.interval == (3, None)
    assert [(run.seed, run.d) for run in found.runs] == [(s, d) for s in range(3) for d in (1, 2)]
    assert str(found).startswith("d90 > 2 (not enough for any of 3 seeds) of ")
    assert json.loads(found.to_json())["dimension"] is None


@pytest.mark.parametrize(
    ("enough", "dimension", "shown"),
    [
        ({0: 4, 1: 2, 2: None}, 4, "d90 = 4 (2 to more than 4 over 3 seeds)"),
        ({0: None, 1: 2, 2: None}, None, "d90 > 4 (not enough for 2 of 3 seeds)"),
    ],
)
def test_a_seed_for_which_no_size_is_enough_counts_as_one_that_needs_more(
    enough, dimension, shown, gpt2, monkeypatch
):
    def score(trials, d, seed):
        if d is None:
            return 1.0
        good = enough[seed] is not None and d >= enough[seed]
        trials.runs.append(SubspaceRun(d, seed, 1.0 if good else 0.0))
        return trials.runs[-1].score

    monkeypatch.setattr(SubspaceSearch, "score", score)
    found = find(gpt2, dims=[1, 2, 4], score=lambda model: 0.1)
    assert found.dimension == dimension
    assert found.by_seed == tuple(enough.values())
    assert found.interval == (2, None)
    assert str(found).startswith(shown)


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(gpt2, tmp_path):
    calls, asked = [], {"dims": [8, 700], "threshold": 0.95, "output_dir": tmp_path}

    def score(model):
        calls.append(model)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return 10.0 - loss_of(model, IDS)

    with pytest.raises(KeyboardInterrupt):
        find(gpt2, score=score, **asked)
    first = find(gpt2, score=score, **asked)
    assert len(calls) == 7 + 1 + 4  # the score before training, and what was not there
    assert first == find(gpt2, score=score, **(asked | {"output_dir": None}))
    calls.clear()
    more = find(gpt2, score=score, **(asked | {"dims": [8, 20, 700]}))
    assert len(calls) == 1 + 3  # only the new size is trained
    assert len(more.runs) == 9
    with pytest.raises(CheckpointError, match="other trials, which differ in steps"):
        find(gpt2, score=score, steps=11, **asked)


def test_scores_of_another_callable_of_the_same_name_are_refused(gpt2, tmp_path):
    asked = {"dims": [8, 700], "threshold": 0.95, "output_dir": tmp_path}
    find(gpt2, score=lambda model: 10.0 - loss_of(model, IDS), **asked)
    with pytest.raises(CheckpointError, match="other trials, which differ in before"):
        find(gpt2, score=lambda model: 2.0 - loss_of(model, IDS), **asked)


def test_accuracy_of_logits_that_are_not_finite_is_refused(classifier):
    model = copy.deepcopy(classifier)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    batch = {"input_ids": torch.tensor([[3, 4]]), "labels": torch.tensor([0])}
    with pytest.raises(EvaluationError, match=r"accuracy of BertFor.* is nan"):
        measure(model, "accuracy", [batch])


@given(start=st.floats(0.1, 10), full=st.floats(0.1, 10), threshold=st.floats(0.05, 1))
def test_a_goal_lies_between_start_and_full(start, full, threshold):
    for metric in ("loss", "accuracy"):
        try:
            goal = goal_of(metric, start, full, threshold)
        except EvaluationError:
            continue
        assert goal.met(full) or threshold == 1
        assert not goal.met(start)
        assert min(start, full) <= goal.target <= max(start, full)


def test_goals_say_why_there_is_none():
    assert goal_of("accuracy", 0.3, 1.0, 0.9) == Goal(0.9, falls=False)
    with pytest.raises(EvaluationError, match=r"without any training, and 0.81 is enough \(0.9 of"):
        goal_of("accuracy", 0.85, 0.9, 0.9)
    with pytest.raises(EvaluationError, match="the full training scores -1; a fraction of that"):
        goal_of("f", -2.0, -1.0, 0.9)
    with pytest.raises(EvaluationError, match="from 2 to 3, which is no improvement"):
        goal_of("loss", 2.0, 3.0, 0.9)


def test_it_is_public():
    assert tnlm.intrinsic_dimension is intrinsic_dimension
