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
from tnlm.metrics.measure import Measure, effect
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
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
        gathering={"power": 2},
    )
    with registered(metric, Gatherer("sizes", ("sizes",), gather)):
        model = tnlm.compress(
            tiny_llama(), "svd", metric="weights", calibration=IDS, max_length=32, progress=False
        )
    assert seen == [2]
    assert tnlm.report(model).plan.metric == "weights"


def test_a_kind_of_target_is_asked_for(tiny_llama):
    asked = []
    with registered(Finder("none", lambda model, targets: asked.append(len(targets)) or [])):
        tnlm.plan(tiny_llama(), "svd", progress=False)
    assert asked == [14]


def test_names_are_taken_once():
    with pytest.raises(OptionError, match="a scheme named 'kron' exists already"):
        tnlm.register(Scheme("kron", "", (), ""))
    with pytest.raises(OptionError, match="no scheme 'kron' was added"):
        tnlm.unregister(Scheme("kron", "", (), ""))
    with pytest.raises(OptionError, match="a dict cannot be registered; allowed: Format, Scheme"):
        tnlm.register({})
