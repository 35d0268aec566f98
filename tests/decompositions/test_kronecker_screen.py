from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions import kronecker_screen
from tnlm.decompositions.kronecker_screen import Spectra, is_low_rank, is_thin
from tnlm.tensors.rearrange import divisor_pairs, rearrange

SPLITS = [(out, inp) for out in divisor_pairs(12) for inp in divisor_pairs(18)]


@given(split=st.sampled_from(SPLITS), part=st.floats(0, 1), seed=st.integers(0, 20))
def test_errors_are_the_tails_of_the_rearranged_matrix(split, part, seed, gaussian):
    weight = gaussian(12, 18, seed=seed)
    values = torch.linalg.svdvals(rearrange(weight, *split)).square()
    terms = round(part * len(values))
    expected = math.sqrt(float(values[terms:].sum() / values.sum()))
    assert Spectra(weight).error(terms, *split) == pytest.approx(expected, abs=1e-7)


@given(split=st.sampled_from(SPLITS), terms=st.integers(1, 12), seed=st.integers(0, 20))
def test_the_floor_of_an_error_needs_no_spectrum(split, terms, seed, gaussian):
    spectra = Spectra(gaussian(12, 18, seed=seed) @ torch.diag(0.5 ** torch.arange(18.0)).double())
    floor = spectra.floor(terms, *split)
    assert not spectra._tails
    least = min(terms, *rearrange(spectra.weight, *split).shape)
    assert floor <= spectra.error(least, *split) ** 2 + 1e-12
    assert is_thin(*split) or floor == 0.0


def test_thin_splits_need_no_product_of_their_own(gaussian, monkeypatch):
    spectra = Spectra(gaussian(12, 18))
    monkeypatch.setattr("tnlm.decompositions.kronecker_screen.rearrange", None)
    thin = [split for split in SPLITS if is_thin(*split)]
    assert len(thin) == 20
    for split in thin:
        assert 0 <= spectra.error(1, *split) < 1


def test_outer_products_are_low_rank():
    low = [split for split in SPLITS if is_low_rank(*split)]
    assert low == [((1, 12), (18, 1)), ((12, 1), (1, 18))]
    assert all(is_thin(*split) for split in low)


def test_a_zero_matrix_has_no_error():
    assert Spectra(torch.zeros(4, 6)).error(1, (2, 2), (2, 3)) == 0.0


def test_a_long_matrix_has_no_gram_matrix_over_its_long_side(gaussian, monkeypatch):
    weight = gaussian(64, 6, seed=1)
    whole = Spectra(weight).error(2, (1, 64), (3, 2)), Spectra(weight).error(2, (64, 1), (1, 6))
    monkeypatch.setattr(kronecker_screen, "SHARED", 8)
    limited = Spectra(weight)
    found = limited.error(2, (1, 64), (3, 2)), limited.error(2, (64, 1), (1, 6))
    assert found == pytest.approx(whole)
    assert all(len(gram) <= 8 for gram in limited._grams.values())
