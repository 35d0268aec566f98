from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.base import Format
from tnlm.decompositions.heads import FORMAT, HeadsSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

COUNT, SIZE, OUT, TOKENS = 5, 3, 4, 300
HIDDEN = COUNT * SIZE


def problem(seed, two_sided):
    """What heads return on some tokens, a projection, and the metric of its output's error."""
    made = torch.Generator().manual_seed(seed)
    draw = {"generator": made, "dtype": torch.float64}
    mix = torch.eye(HIDDEN, dtype=torch.float64) + torch.randn(HIDDEN, HIDDEN, **draw) / 5
    hidden = torch.randn(TOKENS, HIDDEN, **draw) @ mix
    root = torch.randn(OUT, OUT, **draw)
    outputs = Side(root @ root.T) if two_sided else None
    metric = Metric(inputs=outputs, outputs=Side(hidden.T @ hidden / TOKENS))
    return hidden, torch.randn(HIDDEN, OUT, **draw), metric


@given(seed=st.integers(0, 99), heads=st.integers(1, COUNT), two_sided=st.booleans())
def test_rows_are_the_least_squares_on_the_heads_kept(seed, heads, two_sided):
    hidden, weight, metric = problem(seed, two_sided)
    spec = HeadsSpec(heads, SIZE)
    factors = FORMAT.fit(weight, metric, spec)
    columns = torch.cat([hidden[:, h * SIZE : (h + 1) * SIZE] for h in factors["kept"]], 1)
    best = torch.linalg.lstsq(columns, hidden @ weight).solution
    torch.testing.assert_close(factors["rows"], best, atol=1e-5, rtol=1e-5)
    rebuilt = FORMAT.reconstruct((HIDDEN, OUT), spec, factors)
    assert int((rebuilt != 0).any(1).sum()) == heads * SIZE


@given(seed=st.integers(0, 99), two_sided=st.booleans())
def test_the_path_is_the_measured_error_and_falls(seed, two_sided):
    _, weight, metric = problem(seed, two_sided)
    curve = FORMAT.curve(weight, metric, {"size": SIZE}, float("inf"))
    specs, errors = [spec for spec, _ in curve], [error for _, error in curve]
    assert [spec.heads for spec in specs] == list(range(1, COUNT + 1))
    measured = Format.errors(FORMAT, weight, metric, specs)
    assert errors == pytest.approx(measured, abs=1e-4)  # the root of a ridge of 1e-10, and some
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@given(seed=st.integers(0, 99), two_sided=st.booleans())
def test_every_step_takes_the_head_that_helps_most(seed, two_sided):
    _, weight, metric = problem(seed, two_sided)
    alone = [FORMAT.fit(weight, metric, HeadsSpec(n, SIZE))["kept"].tolist() for n in (1, 2)]
    assert set(alone[0]) <= set(alone[1])  # greedy

    def left(heads):
        columns = torch.cat([torch.arange(h * SIZE, (h + 1) * SIZE) for h in heads])
        moment = metric.outputs.values
        rows = torch.linalg.solve(moment[columns][:, columns], moment[columns] @ weight)
        rebuilt = torch.zeros_like(weight)
        rebuilt[columns] = rows
        return metric.relative(weight, rebuilt)

    best = min(left([head]) for head in range(COUNT))
    assert left(alone[0]) == pytest.approx(best, rel=1e-6)
    second = [pair for pair in itertools.combinations(range(COUNT), 2) if set(alone[0]) < set(pair)]
    assert left(sorted(alone[1])) == pytest.approx(min(left(pair) for pair in second), rel=1e-6)


@given(seed=st.integers(0, 99), rank=st.integers(1, HIDDEN - 1), scale=st.sampled_from([1.0, 1e9]))
def test_every_head_is_chosen_once_where_others_predict_it(seed, rank, scale):
    _, weight, metric = problem(seed, two_sided=False)
    values, vectors = torch.linalg.eigh(metric.outputs.values)
    values[:-rank] = 0.0  # less data than hidden values
    metric = Metric(outputs=Side(scale * (vectors * values) @ vectors.T))
    specs = [HeadsSpec(heads, SIZE) for heads in range(1, COUNT + 1)]
    found = [FORMAT.fit(weight, metric, spec)["kept"].tolist() for spec in specs]
    assert [len(set(kept)) for kept in found] == list(range(1, COUNT + 1))
    errors = [error for _, error in FORMAT.curve(weight, metric, {"size": SIZE}, float("inf"))]
    assert errors == pytest.approx(Format.errors(FORMAT, weight, metric, specs), abs=1e-3)


def test_the_fewest_heads_within_a_tolerance():
    _, weight, metric = problem(0, two_sided=False)
    curve = FORMAT.curve(weight, metric, {"size": SIZE}, float("inf"))
    [spec] = FORMAT.within(weight, metric, {"size": SIZE}, curve[2][1])
    assert spec == curve[2][0]
    [all_of_them] = FORMAT.within(weight, metric, {"size": SIZE}, 0.0)
    assert all_of_them.heads == COUNT


@pytest.mark.parametrize("heads", [0, COUNT + 1])
def test_a_number_that_there_is_not(heads):
    with pytest.raises(RankError, match=rf"heads={heads}; 15 values allow 1 to 5 heads of 3"):
        FORMAT.network((HIDDEN, OUT), HeadsSpec(heads, SIZE))
