"""Each kind of choice is added from outside by one object."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

import tnlm
from tnlm.allocation.uniform import Uniform
from tnlm.compression.gatherers.base import Found, Gatherer
from tnlm.decompositions.low_rank import LowRank
from tnlm.errors import OptionError
from tnlm.evaluation.tasks.base import ACC, Task, multiple_choice
from tnlm.metrics.measure import Measure, effect
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.recovery.kinds.base import RecoveryKind
from tnlm.schemes.base import Scheme
from tnlm.targets.base import Finder

IDS = torch.arange(256) % 61 + 3


@contextlib.contextmanager
def registered(*items):
    for item in items:
        assert tnlm.register(item) is item
    try:
        yield
    finally:
        for item in items:
            tnlm.unregister(item)


class Mine(LowRank):
    name = "mine"


class Half(Uniform):
    """Half of every matrix, whatever is asked."""

    name = "half"

    def allocate(self, problem):
        limits = dataclasses.replace(problem.limits, keep=0.5)
        return super().allocate(dataclasses.replace(problem, limits=limits))


def test_a_scheme_and_a_format(tiny_llama, tmp_path):
    scheme = Scheme("outside", "a format of mine", ("mine",), "this test")
    with registered(Mine(), scheme):
        assert "outside" in tnlm.list_schemes()
        model = tnlm.compress(tiny_llama(), "outside", rank=3, progress=False)
        loaded = tnlm.load(tnlm.save(model, tmp_path / "saved"))
        assert torch.equal(model(IDS[None, :8]).logits, loaded(IDS[None, :8]).logits)
    with pytest.raises(OptionError, match="unknown scheme 'outside'"):
        tnlm.compress(tiny_llama(), "outside")


def test_an_allocation(tiny_llama):
    with registered(Half()):
        plan = tnlm.plan(tiny_llama(), "svd", allocation="half", keep_targets=0.9, progress=False)
    assert all(layer.keep <= 0.5 for layer in plan.layers)


def test_a_metric_and_how_it_is_gathered(tiny_llama):
    seen = []

    def gather(task, power):
        seen.append(power)
        weights = {
            t.name: t.weight(task.model).double().abs().mean(0) ** power for t in task.targets
        }
        return Found(lambda target, name: weights[target.name])

    metric = Measure(
        "weights",
        "columns weighted by their weights",
        build=lambda of, damping: Metric(inputs=Side(of("sizes"), damping)),
        importance=effect(None),
        needs=frozenset({"sizes"}),
        gathering={"sizes": {"power": 2}},
    )
    with registered(metric, Gatherer("sizes", ("sizes",), gather)):
        model = tnlm.compress(
            tiny_llama(), "svd", metric="weights", calibration=IDS, max_length=32, progress=False
        )
    assert seen == [2]
    assert tnlm.report(model).plan.metric == "weights"


@pytest.mark.parametrize(("kind", "expected"), [("linear", [14]), ("none", [])])
def test_a_kind_of_target_is_asked_for_if_a_format_replaces_it(kind, expected, tiny_llama):
    asked = []
    with registered(Finder(kind, lambda model, targets: asked.append(len(targets)) or [])):
        tnlm.plan(tiny_llama(), "svd", progress=False)
    assert asked == expected


def test_a_recovery(tiny_llama):
    seen = []

    def run(model, practice):
        seen.append((practice.seed, practice.lessons["tokens"], len(practice.dense)))

    with registered(RecoveryKind("mine", "nothing", run, needs_dense=True)):
        tnlm.compress(
            tiny_llama(),
            "svd",
            targets=["up_proj"],
            recover="mine",
            recover_tokens=64,
            training=IDS,
            max_length=32,
            seed=5,
            progress=False,
        )
    assert seen == [(5, 64, 2)]


def test_a_benchmark(tiny_llama, word_tokenizer):
    task = Task("mine", "this test", (ACC,), adapt=dict, config=multiple_choice("{{query}}"))
    rows = [{"query": "word5", "choices": ["word6", "word7"], "gold": 0}] * 3
    with registered(task):
        found = tnlm.evaluate(
            tiny_llama(), "mine", tokenizer=word_tokenizer, data={"mine": rows}, progress=False
        )
    assert found["mine"].n == 3
    with pytest.raises(OptionError, match="unknown task 'mine'"):
        tnlm.evaluate(tiny_llama(), "mine", tokenizer=word_tokenizer, data={"mine": rows})


def test_names_are_taken_once():
    with pytest.raises(OptionError, match="a scheme named 'kron' exists already"):
        tnlm.register(Scheme("kron", "", (), ""))
    with pytest.raises(OptionError, match="no scheme 'kron' was added"):
        tnlm.unregister(Scheme("kron", "", (), ""))
    with pytest.raises(OptionError, match="a dict cannot be registered; allowed: Format, Scheme"):
        tnlm.register({})
