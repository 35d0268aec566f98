from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.splits import STEPS, balanced_split, largest_within, ranks_at, scaled


@given(size=st.integers(1, 400), parts=st.integers(1, 4))
def test_no_split_has_a_smaller_largest_part(size, parts):
    split = balanced_split(size, parts)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    found = itertools.combinations_with_replacement(divisors, parts)
    assert math.prod(split) == size
    assert max(split) == min(max(other) for other in found if math.prod(other) == size)


@given(limits=st.lists(st.integers(1, 40), min_size=1, max_size=3), room=st.integers(0, 90))
def test_the_largest_ranks_fit_and_one_step_more_does_not(limits, room):
    limits = tuple(limits)
    grow, fits = ranks_at(limits, {}), lambda ranks: sum(ranks) <= room
    found = largest_within(grow, fits)
    assert (found is None) == (room < len(limits))
    if found is not None:
        scales = [grow(step / STEPS) for step in range(1, STEPS + 1)]
        assert sum(found) == max([len(limits), *(sum(ranks) for ranks in scales if fits(ranks))])


@given(limits=st.lists(st.integers(1, 40), min_size=1, max_size=4), scale=st.floats(0.0, 1.0))
def test_scaled_ranks_stay_within_their_limits(limits, scale):
    found = scaled(tuple(limits), scale)
    assert all(1 <= rank <= limit for rank, limit in zip(found, limits, strict=True))
    assert scaled(tuple(limits), 1.0) == tuple(limits)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_ranks_that_are_given_are_not_scaled(scale):
    assert ranks_at((9, 9), {"ranks": [3, 5]})(scale) == (3, 5)
    assert ranks_at((2, 9), {"ranks": [4]})(scale) == (2, 4)
