from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnlm.allocation.base import Limits
from tnlm.allocation.pricing import model_cost
from tnlm.allocation.uniform import decide
from tnlm.decompositions import formats, get_format
from tnlm.decompositions.base import Ceiling, from_dict, to_dict
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.table import TableTarget
from tnlm.tensors.network import Cost

LINEAR = [name for name, structure in formats().items() if "linear" in structure.kinds]
TABLES = [name for name, structure in formats().items() if "embedding" in structure.kinds]


def plan(weight, name, *, kind="linear", metric=None, predict=False, tied=(), **limits):
    kinds = {"linear": MatrixTarget, "embedding": partial(TableTarget, tied=tied)}
    target = kinds[kind]("layer.q", "layer.q", tuple(weight.shape))
    asked = Limits(limits.pop("keep", 1.0), **limits)
    return decide(target, weight, metric or Metric(), get_format(name), asked, predict=predict)


def network_of(layer):
    structure = get_format(layer.format)
    return structure.network(layer.shape, from_dict(structure.spec, layer.spec))


dimension = st.integers(1, 20)


@given(shape=st.tuples(dimension, dimension), keep=st.floats(0.05, 1.0), speed=st.floats(0.3, 2.0))
def test_no_matrix_costs_more_than_asked_nor_as_much_as_dense(shape, keep, speed, gaussian):
    weight, total = gaussian(*shape), math.prod(shape)
    for name in LINEAR:
        layer = plan(weight, name, keep=keep, max_macs=speed)
        assert layer.before == Cost(total, 8 * total, total)
        if layer.format is None:
            assert layer.after == layer.before
            assert layer.note
        else:
            assert layer.after.params <= min(keep * total + 1e-6, total - 1)
            assert layer.after.macs <= speed * total
            network = network_of(layer)
            size = 8 * network.params + network.index_bytes
            assert (layer.after.params, layer.after.bytes) == (network.params, size)


@pytest.mark.parametrize("name", LINEAR)
def test_the_spec_of_least_error_is_chosen(name, gaussian):
    weight = gaussian(12, 10)
    layer, structure = plan(weight, name, keep=0.7, predict=True), get_format(name)
    specs = structure.candidates((12, 10), {}, Ceiling(params=84, macs=120))
    errors = structure.errors(weight, Metric(), specs)  # infinite where a screening leaves one out
    for spec, error in zip(specs, errors, strict=True):
        if math.isfinite(error):
            assert structure.errors(weight, Metric(), [spec])[0] == pytest.approx(error, abs=1e-9)
    assert layer.error == pytest.approx(min(errors), abs=1e-9)
    assert errors[[to_dict(spec) for spec in specs].index(dict(layer.spec))] == layer.error


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("tolerance", [0.3, 0.6])
def test_a_tolerance_takes_the_smallest_spec_that_meets_it(name, tolerance, gaussian):
    weight = gaussian(12, 3) @ gaussian(3, 10, seed=1) + 0.2 * gaussian(12, 10, seed=2)
    layer = plan(weight, name, tolerance=tolerance, predict=True, max_macs=math.inf)
    structure = get_format(name)
    found = structure.within(weight, Metric(), {}, tolerance)
    smallest = min(structure.network((12, 10), spec).params for spec in found)
    if layer.format is None:
        assert smallest >= weight.numel()
        assert layer.note == f"not smaller than dense at tolerance={tolerance}"
    else:
        assert layer.error <= tolerance + 1e-7
        assert layer.after.params == smallest


def test_a_tolerance_overrides_the_fraction(gaussian):
    weight = gaussian(12, 10)
    free, bound = (plan(weight, "low-rank", keep=keep, tolerance=0.5) for keep in (1.0, 0.01))
    assert free.format == "low-rank"
    assert free == bound


def test_errors_are_predicted_where_there_is_a_choice_or_on_demand(gaussian):
    weight = gaussian(12, 10)
    assert plan(weight, "low-rank", keep=0.5).error is None
    assert plan(weight, "low-rank", keep=0.5, predict=True).error > 0
    assert plan(weight, "kronecker", keep=0.5).error > 0


def test_it_says_why_a_matrix_stays_dense(gaussian):
    weight = gaussian(12, 10)
    slow = {"terms": 3, "out_split": (3, 4), "in_split": (5, 2)}
    assert plan(weight, "kronecker", options=slow, max_macs=0.1).note == (
        "needs more than max_macs=0.1 times the dense multiply-adds"
    )
    assert plan(weight, "low-rank", tolerance=1e-6).note == (
        "not smaller than dense at tolerance=1e-06"
    )
    assert plan(weight, "low-rank", keep=0.05).note == "no low-rank of at most 6 parameters"
    assert plan(gaussian(1, 1), "low-rank").note == "no low-rank of at most 0 parameters"


@pytest.mark.parametrize("tolerance", [None, 0.3])
def test_impossible_options_name_the_target(tolerance, gaussian):
    with pytest.raises(
        RankError, match=r"layer\.q: out_split=\(5, 5\) multiplies to 25, not to 12"
    ):
        plan(gaussian(12, 10), "kronecker", tolerance=tolerance, options={"out_split": (5, 5)})


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_limited_in_size_only_and_never_gauged(name, gaussian):
    table = gaussian(30, 16)
    layer = plan(table, name, kind="embedding", keep=0.8, max_macs=1e-9)
    assert layer.format == name
    network = network_of(layer)
    assert network.gauge is None
    assert layer.after.params == network.params <= 0.8 * 480
    # Looking up is free in a dense table; a tied head multiplies.
    assert layer.before == Cost(480, 8 * 480, 0)
    tied = plan(table, name, kind="embedding", keep=0.8, tied=("head",))
    assert tied.before == Cost(480, 8 * 480, 480)
    assert tied.after.params == layer.after.params
    assert tied.after.macs > layer.after.macs


def test_bytes_follow_the_dtype_of_the_weight(gaussian):
    weight = gaussian(12, 10)
    sizes = [
        plan(weight.to(dtype), "low-rank", keep=0.5).after
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert sizes[0].params == sizes[1].params
    assert sizes[0].bytes - sizes[1].bytes == 2 * sizes[0].params


def test_a_model_counts_shared_tensors_once(tiny_gpt2):
    model = tiny_gpt2()
    cost = model_cost(model)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.bytes == 4 * cost.params
    linear = [m for m in model.modules() if type(m).__name__ in ("Conv1D", "Linear")]
    assert model.lm_head in linear
    assert cost.macs == sum(m.weight.numel() for m in linear)
    pair = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False))
    pair[1].weight = pair[0].weight
    assert model_cost(pair) == Cost(12, 48, 24)


def test_costs_add_up():
    target = MatrixTarget("", "", (3, 4))
    total = target.dense_cost(2) + Cost(1, 2, 3)
    assert total == Cost(13, 26, 15)
