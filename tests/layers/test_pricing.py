"""Predicted times count what a layer does beside its products."""

from __future__ import annotations

import pytest

from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.layers.machine import Machine
from tnlm.layers.pricing import VIEWS, layer_time, through
from tnlm.tensors.contraction import chain

BY_STEPS = Machine(0.0, 1.0, (0.0,) * 5, 0.0, (0.0,) * 4, True)
BY_LINES = Machine(0.0, 0.0, (5.0, 4.0, 3.0, 2.0, 1.0), 0.0, (0.0,) * 4, True)


def network(form, shape, **spec):
    structure = get_format(form)
    return structure.network(shape, from_dict(structure.spec, spec))


@pytest.mark.parametrize(("shape", "steps"), [((30, 20), 3), ((20, 30), 2)])
def test_identity_blocks_of_low_rank_take_small_operations(shape, steps):
    """Inputs are ordered, split and added; outputs are joined and ordered."""
    plain, gauged = (network("low-rank", shape, rank=5, gauge=gauge) for gauge in (False, True))
    assert layer_time(plain, BY_STEPS, 4, 1) == 0
    assert layer_time(gauged, BY_STEPS, 4, 1) == steps


def test_steps_on_modes_take_views_and_assembled_factors_more():
    split = {"terms": 2, "out_split": (4, 5), "in_split": (5, 4)}
    plain, gauged = (
        through(each, chain(each), BY_STEPS, 4, 1)
        for each in (network("kronecker", (20, 20), gauge=g, **split) for g in (False, True))
    )
    assert plain > 2 * VIEWS
    assert gauged == plain + 7


def test_a_dense_matrix_is_read_by_rows_and_a_made_one_as_is_fastest():
    assert layer_time((2048, 128), BY_LINES, 4, 1) == 2048 * 128 * 4
    assert layer_time((2048, 128), BY_LINES, 4, 1, arranged=False) == 2048 * 128 * 4 * 5
