from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import ModelError
from tnlm.studies.analysis.marchenko_pastur import edge, random_directions
from tnlm.studies.analysis.spectra import directions, rounding, smaller_gram, summarize
from tnlm.studies.analysis.weights import weight_row
from tnlm.tensors.linalg import energies

sizes = st.integers(1, 24)
seeds = st.integers(0, 2**20)


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(size, seed):
    return torch.linalg.qr(random(size, size, seed=seed))[0]


def spectrum_of(weight):
    return weight_row("w", weight).spectrum


@given(size=st.integers(1, 80), seed=seeds)
def test_an_orthogonal_matrix_needs_ninety_percent_of_its_directions(size, seed):
    found = spectrum_of(orthogonal(size, seed))
    assert found.k90 == -(-9 * size // 10)
    assert found.k99 == -(-99 * size // 100)
    assert found.numerical_rank == size
    assert found.stable_rank == pytest.approx(size)
    assert found.effective_rank == pytest.approx(size)


@given(out=sizes, inner=sizes, rank=sizes, seed=seeds)
def test_a_planted_rank_is_found(out, inner, rank, seed):
    rank = min(out, inner, rank)
    scale = torch.linspace(1.0, 2.0, rank, dtype=torch.float64)
    left, right = orthogonal(out, seed)[:, :rank], orthogonal(inner, seed + 1)[:, :rank]
    found = spectrum_of((left * scale) @ right.T)
    assert found.numerical_rank == rank
    assert found.k90 <= found.k99 <= rank
    assert 1.0 <= found.stable_rank <= found.effective_rank + 1e-9 <= rank + 2e-9
    assert found.limit == min(out, inner)
    assert found.ratio90 == found.k90 / found.limit


@given(out=sizes, inner=sizes, seed=seeds)
def test_rotations_and_scales_change_no_rank(out, inner, seed):
    weight = random(out, inner, seed=seed)
    turned = 3e-4 * orthogonal(out, seed + 1) @ weight @ orthogonal(inner, seed + 2)
    before, after = spectrum_of(weight), spectrum_of(turned)
    assert (before.k90, before.k99) == (after.k90, after.k99)
    assert before.numerical_rank == after.numerical_rank
    assert before.stable_rank == pytest.approx(after.stable_rank)
    assert before.effective_rank == pytest.approx(after.effective_rank)


@given(shares=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20), wanted=st.floats(0.1, 1.0))
def test_directions_are_the_fewest_that_hold_the_share(shares, wanted):
    energy = torch.tensor(sorted(shares, reverse=True), dtype=torch.float64)
    if not float(energy.sum()) > 1e-300:
        return
    energy = energy / energy.sum()
    k = directions(energy, wanted)
    assert float(energy[:k].sum()) >= wanted - 1e-8
    assert k == 1 or float(energy[: k - 1].sum()) < wanted


def test_energy_is_of_squares_not_of_singular_values():
    weight = torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0]))  # 9 of 12 in energy, 3 of 6 otherwise
    found = spectrum_of(weight)
    assert found.k90 == 3
    assert found.stable_rank == pytest.approx(12 / 9)
    entropy = -(0.75 * math.log(0.75) + 3 * math.log(1 / 12) / 12)
    assert found.effective_rank == pytest.approx(math.exp(entropy))


def test_a_zero_matrix_has_no_rank_at_all():
    row = weight_row("w", torch.zeros(3, 5))
    found = row.spectrum
    assert (found.numerical_rank, found.k90, found.k99, found.ratio90) == (0, 0, 0, 0.0)
    assert (found.stable_rank, found.effective_rank, row.above_edge) == (0.0, 0.0, 0.0)
    assert row.kurtosis is None
    assert row.sparsity == 1.0


def test_energies_that_overflow_are_refused():
    with pytest.raises(ModelError, match="energies of a matrix are not finite"):
        summarize(torch.tensor([float("inf"), 1.0]), 2, 0.0)
    with pytest.raises(ModelError, match="up: the energies of a matrix are not finite"):
        weight_row("up", torch.full((2, 2), 1e200, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (1, 9), (9, 1)])
def test_the_gram_matrix_of_the_shorter_side_is_summed_in_parts(shape, monkeypatch):
    weight = random(*shape, seed=0)
    monkeypatch.setattr("tnlm.studies.analysis.spectra.ROWS", 2)
    found = energies(smaller_gram(weight)).sqrt()
    torch.testing.assert_close(found, torch.linalg.svdvals(weight))


def test_rounding_is_that_of_single_precision():
    noisy = torch.diag(torch.tensor([1.0, 0.5 * rounding((2, 2))]))
    assert spectrum_of(noisy).numerical_rank == 1
    assert spectrum_of(torch.diag(torch.tensor([1.0, 1e-3]))).numerical_rank == 2


@pytest.mark.parametrize("shape", [(300, 300), (100, 400), (400, 100), (40, 2000)])
@pytest.mark.parametrize("wanted", [0.5, 0.9, 0.99])
def test_the_random_baseline_agrees_with_a_drawn_matrix(shape, wanted):
    """Within 2 % of the shorter side: fluctuations and finite size."""
    weight = 0.02 * random(*shape, seed=3)
    energy = energies(smaller_gram(weight))
    drawn = directions(energy / energy.sum(), wanted)
    assert abs(drawn - random_directions(shape, wanted)) <= 0.02 * min(shape) + 1
    assert float(energy[0].sqrt()) == pytest.approx(edge(shape, 4e-4), rel=0.03)


def test_directions_stand_out_of_the_noise_by_the_edge():
    noise = random(200, 300, seed=1)
    spikes = 60.0 * orthogonal(200, 2)[:, :3] @ orthogonal(300, 3)[:, :3].T
    assert weight_row("w", noise).above_edge <= 1 / 200
    assert weight_row("w", noise + spikes).above_edge == 3 / 200


def test_a_matrix_of_one_row_has_one_direction():
    assert random_directions((1, 50)) == 1
    assert random_directions((1, 1)) == 1


@given(energy=st.lists(st.floats(0, 1e3), min_size=1, max_size=50).filter(lambda x: max(x) > 1e-6))
def test_the_curve_of_energy_rises_from_none_to_all(energy):
    sorted_energy = torch.tensor(sorted(energy, reverse=True), dtype=torch.float64)
    held = torch.tensor(summarize(sorted_energy, len(energy), 0.0).held, dtype=torch.float64)
    assert (held[0], held[-1]) == (0.0, pytest.approx(1.0))
    assert (held.diff() >= -1e-12).all()
    even = torch.linspace(0, 1, len(held), dtype=torch.float64)
    assert (held >= even - 1e-9).all()  # concave, as the largest come first
