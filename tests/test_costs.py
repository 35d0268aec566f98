"""The numbers and multiply-adds that the pages of schemes state are those that networks count."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest

from tnlm.decompositions import formats, get_format
from tnlm.decompositions.base import Ceiling, from_dict
from tnlm.metrics.named import measures
from tnlm.schemes import schemes
from tnlm.tensors.contraction import chain
from tnlm.tensors.costs import row_macs

MEASURES = measures()

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import costs

    yield costs
    sys.modules.pop("costs")


def network(name, shape, **options):
    form = get_format(name)
    return form.network(shape, from_dict(form.spec, options))


def test_costs_are_told_of_formats_and_statistics_that_exist(costs):
    assert set(costs.TOLD["formats"]) <= set(formats())
    assert set(costs.TOLD["data"]) == set().union(*(measure.needs for measure in MEASURES.values()))
    for scheme in schemes().values():
        told = "\n".join(costs.cost(scheme))
        known = [name for name in scheme.formats if name in costs.TOLD["formats"]]
        assert told.count("**Fit") == told.count("**Result") == len(known)
        assert ("none is looked at" in told) == (scheme.metric == "identity")


@pytest.mark.parametrize(("m", "n", "r"), [(6, 9, 3), (9, 6, 3), (8, 8, 5)])
@pytest.mark.parametrize("gauge", [True, False])
def test_low_rank(m, n, r, gauge):
    found = network("low-rank", (m, n), rank=r, gauge=gauge)
    assert found.params == chain(found).macs == r * (m + n - (r if gauge else 0))


@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("sizes", [(4, 3, 5, 2), (2, 6, 3, 4), (3, 8, 2, 7), (8, 3, 8, 3)])
def test_kronecker(sizes, gauge):
    (a, b, c, d), T = sizes, 3
    found = network(
        "kronecker", (a * b, c * d), terms=T, out_split=[a, b], in_split=[c, d], gauge=gauge
    )
    assert found.params == T * (a * c + b * d) - (T**2 if gauge else 0)
    assert chain(found).macs == T * min(a * c * d + a * b * d, b * c * d + a * b * c)


def test_kronecker_rows():
    v, c, d, T = 50, 4, 3, 2
    found = network("kronecker-rows", (v, c * d), terms=T, in_split=[c, d])
    assert found.params == T * (v * c + d)
    assert row_macs(found) == T * c * d
    assert chain(found).macs == T * (c * d + v * c)


def test_tucker():
    ranks, sizes = (12, 20, 24, 12), (24, 24, 24, 24)
    found = network("tucker", (576, 576), out_split=[24, 24], in_split=[24, 24], ranks=ranks)
    pairs = [(size, rank) for size, rank in zip(sizes, ranks, strict=True) if rank < size]
    assert found.params == math.prod(ranks) + sum(size * rank for size, rank in pairs)


def passes(out, inp, ranks):
    """Return the multiply-adds of a train from its first core on, and from its last."""
    steps = [a * b for a, b in itertools.pairwise(ranks)]
    order = range(len(out))
    first = sum(steps[k] * math.prod(out[: k + 1]) * math.prod(inp[k:]) for k in order)
    last = sum(steps[k] * math.prod(out[k:]) * math.prod(inp[: k + 1]) for k in order)
    return first, last


TRAINS = [((8, 8, 9), (8, 8, 9), (6, 7)), ((2, 3, 4), (3, 2, 2), (3, 4)), ((4, 3), (2, 5), (5,))]


@pytest.mark.parametrize(("out", "inp", "ranks"), TRAINS)
def test_tensor_train(out, inp, ranks):
    shape = math.prod(out), math.prod(inp)
    found = network("tensor-train", shape, out_split=out, in_split=inp, ranks=ranks)
    bonds = (1, *ranks, 1)
    cores = zip(bonds, out, inp, bonds[1:], strict=False)
    assert found.params == sum(a * o * i * b for a, o, i, b in cores)
    assert chain(found).macs <= min(passes(out, inp, bonds))
    assert chain(found, list(found.factors)).macs == passes(out, inp, bonds)[0]
    assert chain(found, list(found.factors)[::-1]).macs == passes(out, inp, bonds)[1]


@pytest.mark.parametrize(("out", "inp", "ranks"), TRAINS[:2])
def test_tensor_ring(out, inp, ranks):
    shape, closing = (math.prod(out), math.prod(inp)), 2
    found = network("tensor-ring", shape, out_split=out, in_split=inp, ranks=(closing, *ranks))
    bonds = (closing, *ranks, closing)
    cores = zip(bonds, out, inp, bonds[1:], strict=False)
    assert found.params == sum(a * o * i * b for a, o, i, b in cores)
    train = network("tensor-train", shape, out_split=out, in_split=inp, ranks=ranks)
    for order in (list(found.factors), list(found.factors)[::-1]):
        assert chain(found, order).macs == closing * chain(train, order).macs


def test_cp():
    found = network("cp", (12, 10), rank=3, out_split=(3, 4), in_split=(5, 2))
    assert found.params == 3 * (3 + 4 + 5 + 2)
    assert chain(found).macs == 3 * (10 + 2 + 3 + 12)


def test_how_far_a_ring_is_from_the_size_asked_for():
    form, dense = get_format("tensor-ring"), 576 * 576
    found = form.candidates((576, 576), {}, Ceiling(0.8 * dense, dense))
    kept = {spec.ranks[0]: form.network((576, 576), spec).params / dense for spec in found}
    page = (DOCS / "schemes" / "tr.md").read_text()
    assert f"{kept[1]:.4f}" in page
    assert f"{kept[2]:.4f}" in page


def test_block_train():
    (a, b), (c, d), r = (24, 24), (32, 48), 8
    found = network("block-train", (a * b, c * d), rank=r, out_split=[a, b], in_split=[c, d])
    assert found.params == chain(found).macs == r * b * c * (a + d)


def test_token_mps():
    found = network("token-mps", (100, 576), in_split=[8, 8, 9], ranks=[4, 5])
    assert found.params == 100 * (8 * 4 + 4 * 8 * 5 + 5 * 9)
