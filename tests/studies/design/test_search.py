from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

import tnlm
from tnlm.errors import CheckpointError, EvaluationError, OptionError
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.front import pareto
from tnlm.studies.design.rules import INSIGHTS, Rule
from tnlm.studies.design.space import DesignSpace


class Counted:
    """The loss, counted; at some calls something else happens."""

    def __init__(self, loss, at=(), do=None):
        self.loss, self.at, self.do, self.calls = loss, at, do, 0

    def __call__(self, model):
        self.calls += 1
        return self.do() if self.calls in self.at else self.loss(model)


def interrupt():
    raise KeyboardInterrupt


def run(model, space, loss, **options):
    options = {"trials": 12, "progress": False} | options
    objectives = {"loss": loss, "size": "params"}
    return tnlm.search(model, space, objectives=objectives, **options)


@pytest.fixture
def small(model):
    """Four layers, one choice in each: 16 configurations."""
    return DesignSpace(model, tensors={"mlp": ["gate_proj", "up_proj", "down_proj"]})


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_the_front_of_a_small_space_is_the_true_one(sampler, model, small, loss, state, same):
    before, random = state(model), torch.get_rng_state()
    metric = Counted(loss)
    found = run(model, small, metric, trials=200, sampler=sampler)
    same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    assert metric.calls == found.measured == small.count(distinct=True) == 16
    every = list(small.configurations())
    swept = tnlm.sweep(model, small, loss, every, progress=False)
    losses = [trial.values["value"] for trial in (swept.dense, *swept.trials[1:])]
    table = [(value, small.cost(c).params) for value, c in zip(losses, every, strict=True)]
    wanted = {every[index].key for index in pareto(table, [False, False])}
    assert {point.configuration.key for point in found.points} == wanted
    assert found.dense.values == {"loss": losses[0], "size": small.dense.params}


def test_spread_schedules_are_measured_first(model, loss):
    space = DesignSpace(model, rules=[Rule("avoid", layers=(0,)), Rule("spacing", value=2)])
    found = run(model, space, loss, trials=3)
    assert found.measured == 3  # the dense model, one layer, two layers
    sizes = {len(point.configuration.layers) for point in found.points}
    assert sizes <= {0, 1, 2}


def test_rules_hold_for_all_that_is_drawn(tmp_path, tiny_llama, loss):
    model = tiny_llama(num_hidden_layers=8)
    space = DesignSpace(model, rules=[*INSIGHTS, Rule("at-most", value=2)], ranks=(1, 2))
    run(model, space, loss, trials=20, storage=tmp_path / "search.log")
    drawn = [
        Configuration.from_dict(line["user_attr"]["configuration"])
        for line in map(json.loads, (tmp_path / "search.log").read_text().splitlines())
        if "configuration" in line.get("user_attr", {})
    ]
    assert len(drawn) == 20
    assert drawn[0] == DENSE
    assert all(space.broken(configuration) is None for configuration in drawn)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_search_that_was_stopped_goes_on_where_it_was(tmp_path, sampler, model, space, loss):
    options = {"trials": 24, "sampler": sampler}
    whole = run(model, space, loss, **options)
    stopped = Counted(loss, at=(7, 14), do=interrupt)
    storage = tmp_path / "new" / "search.log"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(model, space, stopped, storage=storage, **options)
    resumed = run(model, space, stopped, storage=storage, **options)
    assert resumed == whole
    assert stopped.calls == whole.measured + 2
    assert run(model, space, stopped, storage=storage, **options) == whole
    assert stopped.calls == whole.measured + 2


def test_seeds_draw_other_configurations(model, space, loss):
    keys = [
        {p.configuration.key for p in run(model, space, loss, seed=seed, trials=20).points}
        for seed in (0, 0, 1)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_torn_last_line_loses_no_finished_trial(tmp_path, model, space, loss):
    storage = tmp_path / "search.log"
    run(model, space, loss, trials=6, storage=storage)
    whole = storage.read_bytes()
    storage.write_bytes(whole + b'{"op_code":6,"trial')
    metric = Counted(loss)
    found = run(model, space, metric, trials=8, storage=storage)
    assert found == run(model, space, loss, trials=8)
    assert metric.calls <= 2
    assert storage.read_bytes().startswith(whole)


def test_a_trial_of_a_process_that_was_killed_is_measured_by_another(tmp_path, model, small, loss):
    storage = tmp_path / "search.log"
    run(model, small, loss, trials=1, storage=storage)
    lines = storage.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"configuration"' in line)
    storage.write_text("".join(lines[:last]))  # the dense trial runs, for ever
    found = run(model, small, loss, trials=3, storage=storage)
    assert found.dense.values["size"] == small.dense.params
    assert found.measured == 4


@pytest.mark.parametrize(
    ("do", "reason"),
    [(lambda: math.nan, "'loss' is nan"), (lambda: math.inf, "'loss' is inf")],
)
def test_failed_trials_are_recorded_and_not_tried_again(tmp_path, do, reason, model, space, loss):
    storage = tmp_path / "search.log"
    metric = Counted(loss, at=(3, 5), do=do)
    found = run(model, space, metric, trials=10, storage=storage)
    assert len(found.failed) == 2
    assert all(reason in text for text in found.failed.values())
    assert found.measured + 2 == metric.calls
    assert not {str(point.configuration) for point in found.points} & set(found.failed)
    assert all(math.isfinite(point.values["loss"]) for point in found.points)
    assert run(model, space, loss, trials=10, storage=storage) == found


def test_a_perplexity_that_is_not_finite_is_a_failed_trial(model, space, loss):
    def raises():
        raise EvaluationError("the loss of window 0 (from 0) is nan")

    found = run(model, space, Counted(loss, at=(2,), do=raises), trials=6)
    assert list(found.failed.values()) == ["the loss of window 0 (from 0) is nan"]


def test_a_dense_model_that_fails_ends_the_search_and_is_tried_again(tmp_path, model, space, loss):
    storage = tmp_path / "search.log"
    metric = Counted(loss, at=(1,), do=lambda: math.nan)
    with pytest.raises(EvaluationError, match=r"dense model cannot be measured: .*'loss' is nan"):
        run(model, space, metric, storage=storage)
    assert not run(model, space, metric, storage=storage).failed


def test_a_constant_objective_is_an_error(model, space):
    with pytest.raises(EvaluationError, match=r"'loss' is 0\.25 at all 4 configurations measured"):
        run(model, space, lambda _: 0.25)


def test_more_may_be_better(model, small, loss):
    found = tnlm.search(
        model,
        small,
        objectives={"score": lambda m: -loss(m), "macs": "macs", "bytes": "bytes"},
        maximize=["score"],
        trials=100,
        progress=False,
    )
    least = run(model, small, loss, trials=100)
    assert [p.configuration for p in found.points] == [p.configuration for p in least.points]
    assert [-p.values["score"] for p in found.points] == [p.values["loss"] for p in least.points]


def test_given_configurations_are_measured(model, space, loss):
    start = [space.all_tensors([0, 1]), space.all_tensors([3])]
    seen = []
    run(model, space, loss, start=start, trials=3)
    found = tnlm.search(
        model,
        space,
        objectives={"loss": lambda m: seen.append(type(m.model.layers[3].mlp.up_proj)) or loss(m)},
        start=start,
        trials=3,
        progress=False,
    )
    assert [kind.__name__ for kind in seen] == ["Linear", "Linear", "FactorizedLinear"]
    assert found.measured == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objectives": {}}, "give at least one"),
        ({"objectives": {"a": "parms"}}, "objective 'a' is 'parms'; did you mean 'params'"),
        ({"maximize": ["los"]}, "maximize has 'los'; did you mean 'loss'"),
        ({"maximize": "loss"}, "allowed: a collection of names"),
        ({"trials": 0}, "trials=0; allowed: a whole number of at least 1"),
        ({"sampler": "nsga"}, "sampler='nsga'; did you mean 'nsga2'"),
        ({"start": [Configuration((1,), ("q_proj",), 7)]}, r"start: .* allowed: ranks \[1\]"),
    ],
)
def test_what_cannot_be_searched_is_refused(options, message, model, space):
    with pytest.raises(OptionError, match=message):
        tnlm.search(model, space, **{"objectives": {"loss": print}, "progress": False} | options)


def test_an_objective_must_give_one_number(model, space):
    with pytest.raises(OptionError, match=r"objective 'loss' returned \['a', 'b'\]"):
        run(model, space, lambda _: {"a": 1, "b": 2})


def test_journals_of_other_things_are_refused_before_any_work(
    tmp_path, model, space, small, loss, tiny_llama
):
    storage, metric = tmp_path / "search.log", Counted(loss)
    run(model, space, loss, trials=2, storage=storage)
    with pytest.raises(CheckpointError, match="another search: space differs"):
        run(model, small, metric, storage=storage)
    with pytest.raises(CheckpointError, match="another search: objectives differs"):
        run(model, space, metric, storage=storage, maximize=["loss"])
    other = tiny_llama(num_hidden_layers=4, seed=1)
    with pytest.raises(CheckpointError, match="another search: model differs"):
        run(other, space, metric, storage=storage)
    (tmp_path / "text").write_text("once upon a time\n")
    with pytest.raises(CheckpointError, match="is not the journal of a search"):
        run(model, space, metric, storage=tmp_path / "text")
    for path in (tmp_path, tmp_path / "text" / "search.log"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            run(model, space, metric, storage=path)
    assert metric.calls == 0


def test_a_missing_optuna_names_the_extra(monkeypatch, model, space, loss):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(OptionError, match=r"pip install 'tnlm\[search\]'"):
        run(model, space, loss)


def test_search_says_nothing_unless_asked(model, space, loss, capfd):
    run(model, space, loss, trials=3)
    assert capfd.readouterr() == ("", "")
    run(model, space, loss, trials=3, progress=True)
    assert "search: 100%" in capfd.readouterr().err


WORKER = """
import sys, torch, tnlm
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=6,
             num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.arange(40).reshape(2, 20)
calls = 0
def loss(model):
    global calls
    calls += 1
    return model(input_ids=ids, labels=ids).loss
found = tnlm.search(model, tnlm.DesignSpace(model), objectives={"loss": loss, "size": "params"},
                    trials=60, storage=sys.argv[1], progress=False)
print(calls, found.measured)
"""


@pytest.mark.slow  # they load torch and transformers anew
def test_processes_share_one_search(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path / "search.log")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    counts = [tuple(map(int, worker.communicate()[0].split())) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    measured = max(found for _, found in counts)
    assert all(calls >= 1 for calls, _ in counts)
    # Two that draw at the same instant may measure the same; three searches apart take thrice all.
    assert measured <= sum(calls for calls, _ in counts) < 2 * measured
