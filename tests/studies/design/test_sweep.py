from __future__ import annotations

import csv
import io
import json
import math

import pytest
import torch

from tnlm.errors import CheckpointError, EvaluationError, OptionError
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.schedules import spaced
from tnlm.studies.design.series import (
    by_count,
    by_distance,
    by_layer,
    by_matrix,
    by_rank,
    by_tensor,
    published,
)
from tnlm.studies.design.space import DesignSpace
from tnlm.studies.design.sweep import sweep


class Counted:
    """A score that counts its calls, and does something at one of them."""

    def __init__(self, score, at=None, do=None):
        self.score, self.at, self.do, self.calls = score, at, do, 0

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.at:
            return self.do()
        return self.score(model)


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise EvaluationError("the loss of window 3 is nan")


def run(model, space, score, configurations=None, **options):
    wanted = by_layer(space) if configurations is None else configurations
    return sweep(model, space, score, wanted, progress=False, **options)


def test_sensitivity_by_layer_finds_the_layer_that_matters(model, loss, state, same):
    for layer in (0, 1, 3):  # these are of rank one already
        for p in model.model.layers[layer].parameters():
            if p.dim() == 2:
                with torch.no_grad():
                    p.copy_(torch.outer(p[:, 0], p[0]))
    before = state(model)
    space = DesignSpace(model)
    found = run(model, space, loss)
    changes = [abs(found.changes(trial)["value"]) for trial in found.trials]
    assert max(changes[0], changes[1], changes[3]) < 1e-5 < changes[2]
    assert [t.configuration.layers for t in found.trials] == [(0,), (1,), (2,), (3,)]
    same(before, state(model))


def test_tables_of_a_sweep(model, space, loss):
    found = run(model, space, lambda m: {"loss": loss(m), "one": 1})
    rows = json.loads(found.to_json())
    assert len(rows) == 5
    assert rows[0]["percent"] == rows[0]["loss_change"] == 0
    assert rows[2]["layers"] == "1"
    assert rows[2]["loss"] == pytest.approx(rows[0]["loss"] + rows[2]["loss_change"])
    table = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [float(row["percent"]) for row in table] == [row["percent"] for row in rows]
    assert "layers 3: q_proj" in str(found)


def test_sets_of_configurations(space, model):
    assert len(list(by_layer(space))) == 4
    tensors = list(by_tensor(space))
    assert [c.tensors for c in tensors] == [(name,) for name in space.tensors]
    assert {c.layers for c in tensors} == {(0, 1, 2, 3)}
    assert len(set(by_matrix(space))) == 28
    ranks = DesignSpace(model, ranks=(1, 2, 5))
    apart = by_distance(space, [3, 1], start=0, count=2)
    assert [c.layers for c in apart] == [(0, 3), (0, 1)]
    assert [c.layers for c in by_count(space, [1, 2, 4])] == [(2,), (1, 3), (0, 1, 2, 3)]
    assert [c.layers for c in published(space)][::9] == [(0, 3), (0, 1, 2, 3)]
    assert [c.rank for c in by_rank(ranks, spaced(0, 2, 2, depth=4))] == [1, 2, 5]


def test_errors_fall_as_ranks_grow(model):
    space = DesignSpace(model, ranks=(1, 4, 10), formats=("low-rank",))
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}

    def distance(changed):
        up = changed.model.layers[1].mlp.up_proj
        weight = up.to_dense() if hasattr(up, "to_dense") else up.weight
        return (weight - dense["model.layers.1.mlp.up_proj.weight"]).norm()  # a tensor will do

    found = run(model, space, distance, by_rank(space, [1]))
    values = [trial.values["value"] for trial in found.trials]
    assert values == sorted(values, reverse=True)
    norms = torch.linalg.svdvals(dense["model.layers.1.mlp.up_proj.weight"].double())
    tails = [float(norms[rank:].norm()) for rank in space.ranks]
    assert values == pytest.approx(tails, abs=1e-5)


def test_a_sweep_that_was_stopped_loses_no_finished_trial(
    tmp_path, model, space, loss, state, same
):
    journal, before = tmp_path / "trials.jsonl", state(model)
    stopped = Counted(loss, at=4, do=interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, space, stopped, journal=journal)
    same(before, state(model))
    resumed = Counted(loss)
    found = run(model, space, resumed, journal=journal)
    assert resumed.calls == 5 - 3
    assert found == run(model, space, loss)
    again = Counted(loss)
    assert run(model, space, again, journal=journal) == found
    assert again.calls == 0


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (fail, "EvaluationError: the loss of window 3 is nan"),
        (lambda: math.nan, "the score 'value' is nan, not a finite number"),
        (lambda: {"value": -math.inf}, "'value' is -inf"),
        (lambda: "good", "the score 'value' is 'good'; it must be a number"),
        (dict, "an empty mapping"),
    ],
)
def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(
    tmp_path, do, message, model, space, loss
):
    journal = tmp_path / "trials.jsonl"
    found = run(model, space, Counted(loss, at=3, do=do), journal=journal)
    assert [trial.configuration.layers for trial in found.failed] == [(1,)]
    assert message in found.failed[0].error
    assert found.failed[0].values == {}
    assert message in str(found)
    assert json.loads(found.to_json())[2]["value"] is None
    assert run(model, space, loss, journal=journal) == found  # not tried again


def test_a_dense_model_that_fails_ends_the_sweep(tmp_path, model, space, loss):
    journal = tmp_path / "trials.jsonl"
    with pytest.raises(EvaluationError, match=r"dense model cannot be measured: .*'value' is nan"):
        run(model, space, Counted(loss, at=1, do=lambda: math.nan), journal=journal)
    assert not run(model, space, loss, journal=journal).failed


def test_a_metric_that_changes_its_names_is_refused(model, space, loss):
    odd = Counted(loss, at=2, do=lambda: {"accuracy": 0.5})
    with pytest.raises(
        EvaluationError, match=r"has names \['accuracy'\] for layers 0.*\['value'\]"
    ):
        run(model, space, odd)


def test_what_cannot_be_done_is_refused_before_any_work(tmp_path, model, space, loss, tiny_llama):
    score = Counted(loss)
    with pytest.raises(CheckpointError, match="cannot be written"):
        run(model, space, score, journal=tmp_path)
    with pytest.raises(OptionError, match="layer 9; the model has layers 0 to 3"):
        run(model, space, score, [DENSE, space.all_tensors([1]), Configuration((9,), ("q_proj",))])
    run(model, space, loss, [], journal=tmp_path / "trials.jsonl")
    other = tiny_llama(num_hidden_layers=4, seed=1)
    with pytest.raises(CheckpointError, match="journal of other trials, which differ in model"):
        run(other, space, score, journal=tmp_path / "trials.jsonl")
    assert score.calls == 0
