"""Rounding of what replaces a matrix: every format packs, and the metric decides how."""

import pytest
import torch
from torch import nn

from tnlm.checkpoint.entries import build, dense_module, network_of
from tnlm.decompositions import formats, get_format
from tnlm.decompositions.base import Ceiling, to_dict
from tnlm.layers.packed import Packed
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.plans.plan import LayerPlan
from tnlm.precision.grid import Precision, least_bytes
from tnlm.precision.rounding import nearest
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.rounding import rounded
from tnlm.tensors.network import Cost

ROWS, COLUMNS = 48, 64
LINEAR = [
    name
    for name in formats()
    if {"linear", "submatrix"} & get_format(name).kinds and name not in ("stack-tucker",)
]


@pytest.fixture(scope="module")
def model():
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict({"m": nn.Linear(COLUMNS, ROWS)})
    fall = torch.linspace(0, -3, COLUMNS).exp()
    model["m"].weight = nn.Parameter(torch.randn(ROWS, COLUMNS, generator=generator) * fall)
    return model


@pytest.fixture(scope="module")
def metric():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS)
    return Metric(inputs=Side(inputs.T.double() @ inputs.double() / 200))


def target():
    return MatrixTarget("m", "m", (ROWS, COLUMNS))


def planned(name, keep=0.6):
    if name is None:
        return LayerPlan("m", "linear", (ROWS, COLUMNS), None, {}, Cost(0, 0, 0), Cost(0, 0, 0))
    structure = get_format(name)
    spec = structure.candidates((ROWS, COLUMNS), {}, Ceiling(keep * ROWS * COLUMNS))[0]
    found = to_dict(spec)
    return LayerPlan("m", "linear", (ROWS, COLUMNS), name, found, Cost(0, 0, 0), Cost(0, 0, 0))


@pytest.mark.parametrize("name", [None, *LINEAR])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_format_is_packed_as_its_entry_and_its_bytes_say(model, name, bits):
    unit, layer, grid = target(), planned(name), Precision(bits, 16)
    fitted = unit.fit(model, layer, Metric())
    weight = unit.weight(model)
    before = [p.numel() for p in fitted.pieces[0][2].parameters() if p.dim() == 2]
    found = rounded(fitted, grid, lambda _: Metric(), weight)
    ((_, entry, module),) = found.pieces
    packed = {n: m for n, m in module.named_modules() if isinstance(m, Packed)}
    assert set(entry["precision"]) == set(packed)
    shapes = unit.packed_shapes(None if name is None else network_of(entry))
    assert sorted(r * c for r, c in shapes) == sorted(before)
    held = [
        tensor.numel() * tensor.element_size()
        for tensor_name, tensor in module.state_dict().items()
        if tensor_name.rpartition(".")[2] in ("codes", "scales", "zeros", "weight")
    ]
    assert sum(held) == least_bytes(shapes, grid, 4)
    again = build(entry, device="cpu", dtype=torch.float32)
    again.load_state_dict(module.state_dict())
    x = torch.randn(3, COLUMNS)
    assert torch.equal(again(x), module(x))
    assert torch.allclose(dense_module(entry, again)(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [None, "low-rank", "kronecker", "tensor-train", "tucker", "submatrix"]
)
def test_eight_bits_change_little_and_the_error_is_measured(model, metric, name):
    unit, layer = target(), planned(name)
    fitted = unit.fit(model, layer, Metric() if name == "tucker" else metric)
    found = rounded(fitted, Precision(8, None), lambda _: metric, unit.weight(model))
    weight, stored = unit.weight(model), found.pieces[0][2].weight.detach()
    assert found.error == pytest.approx(metric.relative(weight, stored))
    plain = unit.fit(model, layer, Metric() if name == "tucker" else metric).pieces[0][2]
    assert found.error < metric.relative(weight, plain.weight.detach()) + 0.02


@pytest.mark.parametrize("bits", [4, 3])
def test_under_a_metric_a_matrix_is_never_rounded_worse_than_to_the_nearest(model, metric, bits):
    unit, grid = target(), Precision(bits, 16)
    found = rounded(
        unit.fit(model, planned(None), metric), grid, lambda _: metric, unit.weight(model)
    )
    weight = unit.weight(model)
    plain = nearest(weight, grid, metric.inputs.values.diagonal())
    assert found.error <= metric.relative(weight, plain.values()) + 1e-6


@pytest.mark.parametrize("gauge", [True, False])
def test_the_last_factor_makes_up_for_the_first(model, metric, gauge):
    unit, grid = target(), Precision(4, 16)
    layer = planned("low-rank")
    layer = LayerPlan(**{**vars(layer), "spec": {**layer.spec, "gauge": gauge, "rank": 24}})
    weight = unit.weight(model)
    found = rounded(unit.fit(model, layer, metric), grid, lambda _: metric, weight)
    apart = unit.fit(model, layer, metric).pieces[0][2]
    with torch.no_grad():
        for name in ("left", "right"):
            factor = getattr(apart, name).weight
            factor.copy_(nearest(factor, grid).values())
    assert found.error < metric.relative(weight, apart.weight.detach())


def test_factors_too_small_to_gain_stay_as_they_are(model):
    unit, layer = target(), planned("low-rank")
    layer = LayerPlan(**{**vars(layer), "spec": {"rank": 1, "gauge": False}})
    found = rounded(
        unit.fit(model, layer, Metric()), Precision(8), lambda _: Metric(), unit.weight(model)
    )
    ((_, entry, module),) = found.pieces
    assert set(entry["precision"]) == {"right"}  # a column of 1 needs a scale for each code
    assert not isinstance(module.left, Packed)
