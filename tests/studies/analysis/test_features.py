from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import CalibrationError
from tnlm.studies.analysis.features import feature_rows

INPUTS = 200
sizes, seeds = st.integers(1, 16), st.integers(0, 2**20)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rows_of(weight, x):
    moment, mean = x.T @ x / len(x), x.mean(0)
    found = feature_rows("w", weight, moment, mean, len(x))
    return {(row.centered, row.without_top): row for row in found}


@given(out=sizes, inner=sizes, seed=seeds)
def test_energies_are_those_of_the_outputs_themselves(out, inner, seed):
    weight, x = random(out, inner, seed=seed), random(INPUTS, inner, seed=seed + 1) + 0.7
    found = rows_of(weight, x)
    y = x @ weight.T
    for centered in (False, True):
        shown = y - y.mean(0) * centered
        energy = torch.linalg.svdvals(shown).square()
        row = found[centered, False]
        assert row.spectrum.stable_rank == pytest.approx(float(energy.sum() / energy[0]))
        assert row.top_share == pytest.approx(float(energy[0] / energy.sum()))
        assert row.spectrum.limit == min(out, inner)
        assert row.inputs == INPUTS
        if min(out, inner) > 1:
            rest = energy[1:]
            stable = float(rest.sum() / rest[0])
            assert found[centered, True].spectrum.stable_rank == pytest.approx(stable, rel=1e-6)


@given(out=sizes, inner=sizes, rank=sizes, seed=seeds)
def test_features_of_a_rank_k_map_need_at_most_k_directions(out, inner, rank, seed):
    rank = min(out, inner, rank)
    weight = random(out, rank, seed=seed) @ random(rank, inner, seed=seed + 1)
    found = rows_of(weight, random(INPUTS, inner, seed=seed + 2) + 1.0)
    for row in found.values():
        assert row.spectrum.k99 <= rank
        assert row.spectrum.numerical_rank <= rank


@given(out=sizes, inner=sizes, seed=seeds)
def test_rotated_inputs_and_outputs_change_no_rank(out, inner, seed):
    weight, x = random(out, inner, seed=seed), random(INPUTS, inner, seed=seed + 1)
    left = torch.linalg.qr(random(out, out, seed=seed + 2))[0]
    right = torch.linalg.qr(random(inner, inner, seed=seed + 3))[0]
    before, after = rows_of(weight, x), rows_of(left @ weight @ right, x @ right)
    for key, row in before.items():
        assert row.spectrum.k90 == after[key].spectrum.k90
        assert row.spectrum.effective_rank == pytest.approx(after[key].spectrum.effective_rank)


def test_a_mean_that_dominates_is_seen_and_taken_away():
    x = random(INPUTS, 10, seed=0) + 100.0
    found = rows_of(torch.eye(10, dtype=torch.float64), x)
    assert found[False, False].spectrum.k90 == 1
    assert found[False, False].top_share > 0.99
    assert found[True, False].spectrum.k90 >= 8
    assert found[False, True].spectrum.k90 >= 8


def test_an_outlier_direction_is_seen_and_taken_away():
    x = random(INPUTS, 10, seed=0)
    x[:, 3] *= 1000.0
    found = rows_of(torch.eye(10, dtype=torch.float64), x)
    assert found[True, False].spectrum.k90 == 1
    assert found[True, True].spectrum.k90 >= 7
    assert found[True, True].spectrum.limit == 9


def test_few_inputs_bound_the_rank_and_are_noted():
    found = rows_of(random(12, 12, seed=0), random(5, 12, seed=1))
    assert found[True, False].spectrum.limit == 4
    assert found[True, False].spectrum.numerical_rank <= 4
    assert found[False, False].spectrum.limit == 5
    assert found[True, False].note == "only 5 inputs for 12 outputs, whose rank is at most 4"
    enough = rows_of(random(12, 12, seed=0), random(13, 12, seed=1))
    assert {row.note for row in enough.values()} == {""}


def test_constant_inputs_have_no_centered_features():
    x = torch.ones(20, 6, dtype=torch.float64)
    found = rows_of(random(4, 6, seed=0), x)
    assert found[False, False].spectrum.k90 == 1
    assert found[True, False].spectrum.k90 == found[True, False].spectrum.numerical_rank == 0
    assert found[True, False].top_share == 0.0
    nothing = rows_of(random(4, 6, seed=0), 0.0 * x)
    assert all(row.spectrum.numerical_rank == 0 for row in nothing.values())


def test_one_input_leaves_no_direction_about_its_mean():
    row = rows_of(random(4, 6, seed=0), random(1, 6, seed=1))[True, True]
    assert row.spectrum.limit == 0
    assert row.spectrum.ratio90 == 0.0


def test_moments_that_are_not_finite_are_refused():
    moment = torch.full((3, 3), float("nan"))
    with pytest.raises(CalibrationError, match="the moments of up_proj's inputs are not finite"):
        feature_rows("up_proj", torch.eye(3), moment, torch.zeros(3), 10)
