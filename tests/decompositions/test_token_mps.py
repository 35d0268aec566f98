from __future__ import annotations

import math

import pytest
import tensorly
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train

from tnlm.decompositions import token_mps
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.token_mps import FORMAT, TokenMPSSpec
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

seeds, parts = st.integers(0, 20), st.floats(0, 1)
splits = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)


def ranks_of(split, part):
    """Return ranks at about ``part`` of what the modes of one row allow."""
    cuts = [(math.prod(split[:k]), math.prod(split[k:])) for k in range(1, len(split))]
    return tuple(max(1, round(part * min(cut))) for cut in cuts)


def fitted(table, spec):
    shape = tuple(table.shape)
    return FORMAT.reconstruct(shape, spec, FORMAT.fit(table, Metric(), spec))


@given(split=splits, part=parts, seed=seeds)
def test_every_row_is_tensorlys_tensor_train(split, part, seed, gaussian):
    table = gaussian(3, math.prod(split), seed=seed)
    spec = TokenMPSSpec(split, ranks_of(split, part))
    # tensorly caps ranks at what a truncated row still has; its own are then smaller.
    for row, rebuilt in zip(table, fitted(table, spec), strict=True):
        train = tensor_train(row.reshape(split).numpy(), [1, *spec.ranks, 1])
        expected = torch.from_numpy(tensorly.tt_to_tensor(train)).flatten()
        torch.testing.assert_close(rebuilt, expected, atol=1e-9, rtol=0)


@given(split=splits, part=parts, row=st.integers(0, 6), seed=seeds)
def test_changing_one_row_leaves_the_cores_of_others(split, part, row, seed, gaussian):
    table = gaussian(7, math.prod(split), seed=seed)
    spec = TokenMPSSpec(split, ranks_of(split, part))
    before = FORMAT.fit(table, Metric(), spec)
    table[row] = gaussian(math.prod(split), seed=seed + 1)
    after = FORMAT.fit(table, Metric(), spec)
    others = [k for k in range(7) if k != row]
    assert all(torch.equal(before[name][others], after[name][others]) for name in before)
    assert any(not torch.equal(before[name][row], after[name][row]) for name in before)


@given(split=splits, part=parts, seed=seeds)
def test_the_error_of_a_row_is_at_most_its_tails(split, part, seed, gaussian):
    table = gaussian(3, math.prod(split), seed=seed)
    spec = TokenMPSSpec(split, ranks_of(split, part))
    errors = (table - fitted(table, spec)).square().sum(1)
    for row, error in zip(table, errors, strict=True):
        tails = [
            float(torch.linalg.svdvals(row.reshape(math.prod(split[:k]), -1))[rank:].square().sum())
            for k, rank in enumerate(spec.ranks, start=1)
        ]
        assert max(tails) - 1e-9 <= float(error) <= sum(tails) + 1e-9


@given(tolerance=st.floats(0.01, 0.99), seed=seeds)
def test_a_tolerance_is_met_over_all_rows(tolerance, seed, gaussian):
    table = gaussian(6, 24, seed=seed) * torch.logspace(0, -2, 6, dtype=torch.float64)[:, None]
    found = FORMAT.within(table, Metric(), {}, tolerance)
    assert {len(spec.in_split) for spec in found} == {2, 3, 4}
    for spec in found:
        assert Metric().relative(table, fitted(table, spec)) <= tolerance + 1e-9
        share = tolerance**2 / len(spec.ranks) * float(table.square().sum())
        for k, rank in enumerate(spec.ranks, start=1):
            matrices = table.reshape(6, math.prod(spec.in_split[:k]), -1)
            tail = torch.linalg.svdvals(matrices)[:, rank - 1 :].square().sum()
            assert rank == 1 or float(tail) > share  # no rank to spare


def test_rows_are_decomposed_in_chunks(gaussian, monkeypatch):
    table, spec = gaussian(10, 12), TokenMPSSpec((2, 2, 3), (2, 2))
    whole = FORMAT.fit(table, Metric(), spec)
    energy = token_mps._pooled_energy(table, 4)
    monkeypatch.setattr(token_mps, "CHUNK", 3)
    pieces = FORMAT.fit(table, Metric(), spec)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    torch.testing.assert_close(token_mps._pooled_energy(table, 4), energy)


def test_splits_are_compared_on_evenly_spaced_rows(gaussian, monkeypatch):
    monkeypatch.setattr(token_mps, "SAMPLE", 5)
    table, spec = gaussian(20, 12), TokenMPSSpec((3, 4), (1,))
    [reported] = FORMAT.errors(table, Metric(), [spec])
    assert reported == Metric().relative(table[::4], fitted(table[::4], spec))


def test_rows_of_low_rank_and_zero_rows_are_kept(gaussian):
    table = torch.stack([torch.kron(gaussian(3), gaussian(4, seed=1)), torch.zeros(12).double()])
    torch.testing.assert_close(fitted(table, TokenMPSSpec((3, 4), (1,))), table)
    torch.testing.assert_close(fitted(table, TokenMPSSpec((3, 2, 2), (3, 2))), table)


def test_options_fix_the_spec():
    def specs(**options):
        return FORMAT.candidates((100, 24), options, Ceiling(2000))

    assert {spec.in_split for spec in specs()} == {(2, 2, 2, 3), (2, 3, 4), (4, 6)}
    assert {spec.ranks for spec in specs(ranks=[1])} == {(1,), (1, 1), (1, 1, 1)}
    assert [spec.ranks for spec in specs(ranks=[1, 2])] == [(1, 2)]
    assert [spec.in_split for spec in specs(in_split=[3, 8])] == [(3, 8)]


@pytest.mark.parametrize(
    "options",
    [{"in_split": (4, 6), "ranks": (2, 2)}, {"ranks": (9, 9)}, {"in_split": (24,)}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(RankError):
        FORMAT.candidates((100, 24), options, Ceiling())


def weighing(gaussian, rows, width, seed):
    root = gaussian(width, width, seed=seed + 1) * torch.exp(gaussian(width, seed=seed + 2))
    return Metric(Side(gaussian(rows, seed=seed).square()), Side(root.T @ root, 0.1))


@given(
    split=st.lists(st.integers(1, 4), min_size=2, max_size=3).map(tuple), seed=st.integers(0, 20)
)
def test_under_weights_the_error_is_never_above_that_of_plain_sweeps(split, seed, gaussian):
    width = math.prod(split)
    table, metric = gaussian(7, width, seed=seed), weighing(gaussian, 7, width, seed)
    spec = TokenMPSSpec(split, (1,) * (len(split) - 1))
    errors = [
        metric.relative(table, FORMAT.reconstruct((7, width), spec, FORMAT.fit(table, norm, spec)))
        for norm in (metric, Metric())
    ]
    assert errors[0] <= errors[1] + 1e-9


def test_under_weights_chunks_of_rows_are_fitted_by_their_own_weights(gaussian, monkeypatch):
    table, metric = gaussian(9, 6), weighing(gaussian, 9, 6, 0)
    spec = TokenMPSSpec((2, 3), (1,))
    monkeypatch.setattr("tnlm.decompositions.token_mps.CHUNK", 4)
    parts = FORMAT.reconstruct((9, 6), spec, FORMAT.fit(table, metric, spec))
    for rows in (slice(0, 4), slice(8, 9)):
        own = Metric(Side(metric.outputs.values[rows]), metric.inputs)
        alone = FORMAT.fit(table[rows], own, spec)
        expected = FORMAT.reconstruct((len(table[rows]), 6), spec, alone)
        torch.testing.assert_close(parts[rows], expected)


def test_under_weights_a_tolerance_is_met(gaussian):
    table, metric = gaussian(9, 8), weighing(gaussian, 9, 8, 0)
    for spec in FORMAT.within(table, metric, {}, 0.3):
        found = FORMAT.reconstruct((9, 8), spec, FORMAT.fit(table, metric, spec))
        assert metric.relative(table, found) <= 0.3
