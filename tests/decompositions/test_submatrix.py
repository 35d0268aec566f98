from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.checkpoint.entries import build, dense_module
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.submatrix import FORMAT, SubmatrixSpec, sides_of
from tnlm.errors import OptionError, RankError
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.metrics.named.surgery import Operated
from tnlm.metrics.sides import Side
from tnlm.tensors.costs import macs

SHAPE = (6, 9)


@pytest.fixture
def metric(gaussian):
    root = gaussian(9, 20, seed=3)
    return InputMoment(root @ root.T)


def built(factors, spec, bias=None):
    entry = {
        "kind": "submatrix",
        "shape": list(SHAPE),
        "bias": bias is not None,
        "format": "submatrix",
        "options": {"rows": spec.rows, "columns": spec.columns},
    }
    return entry, build(entry, dtype=torch.float64).store(factors, bias)


@pytest.mark.parametrize("sizes", [(6, 9), (4, 9), (6, 5), (1, 1), (3, 4)])
def test_the_layer_computes_what_is_reconstructed(sizes, gaussian, metric):
    spec, weight = SubmatrixSpec(*sizes), gaussian(*SHAPE)
    factors = FORMAT.fit(weight, metric, spec)
    dense = FORMAT.reconstruct(SHAPE, spec, factors)
    entry, layer = built(factors, spec, torch.linspace(-1, 1, 6).double())
    assert torch.equal(layer.to_dense(), dense)
    assert len(dense.abs().sum(1).nonzero()) == spec.rows
    for lead in [(), (0,), (2, 3)]:
        x = gaussian(*lead, 9, seed=5).double()
        torch.testing.assert_close(layer(x), x @ dense.T + layer.bias)
        torch.testing.assert_close(dense_module(entry, layer)(x), layer(x))
    network = FORMAT.network(SHAPE, spec)
    assert layer.macs == macs(network) == network.params == layer.core.weight.numel()
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) == network.index_bytes


def test_all_rows_and_columns_are_the_matrix(gaussian, metric):
    weight, spec = gaussian(*SHAPE), SubmatrixSpec(*SHAPE)
    factors = FORMAT.fit(weight, metric, spec)
    assert torch.equal(FORMAT.reconstruct(SHAPE, spec, factors), weight.double())


def test_what_costs_least_is_removed():
    weight = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
    factors = FORMAT.fit(weight, Metric(), SubmatrixSpec(2, 2))
    assert factors["rows_order"].tolist() == factors["columns_order"].tolist() == [0, 2, 1]


@given(keep=st.floats(0.05, 1.0), speed=st.floats(0.2, 2.0))
def test_candidates_are_within_their_budget(keep, speed):
    ceiling = Ceiling(keep * math.prod(SHAPE), speed * math.prod(SHAPE))
    for spec in FORMAT.candidates(SHAPE, {}, ceiling):
        network = FORMAT.network(SHAPE, spec)
        assert network.params <= ceiling.params
        assert macs(network) <= ceiling.macs


@pytest.mark.parametrize("tolerance", [1e-9, 0.3, 0.7])
def test_a_tolerance_is_met(tolerance, gaussian, metric):
    weight = gaussian(*SHAPE)
    found = FORMAT.within(weight, metric, {}, tolerance)
    assert len(found) == 2
    assert max(FORMAT.errors(weight, metric, found)) <= tolerance


def test_more_rows_than_there_are_is_refused():
    with pytest.raises(RankError, match="rows=7; a 6x9 matrix allows 1 to 6"):
        FORMAT.network(SHAPE, SubmatrixSpec(7, 9))


def test_what_was_chosen_for_all_matrices_together_is_kept(gaussian):
    weight, core = gaussian(*SHAPE), gaussian(2, 3, seed=9)
    rows, columns = torch.tensor([1, 4]), torch.tensor([0, 2, 8])
    metric = Operated(Side(torch.eye(6)), Side(torch.eye(9)), rows, columns, core)
    factors = FORMAT.fit(weight, metric, SubmatrixSpec(2, 3))
    table = FORMAT.reconstruct(SHAPE, SubmatrixSpec(2, 3), factors)
    assert torch.equal(table[rows][:, columns], core.double())
    with pytest.raises(OptionError, match="allowed: 2 and 3, which were chosen"):
        FORMAT.fit(weight, metric, SubmatrixSpec(2, 4))


def test_a_metric_without_sides_is_made_where_the_weight_is():
    weight = torch.empty(3, 5, device="meta")
    assert [side.device.type for side in sides_of(Metric(), weight)] == ["meta", "meta"]
