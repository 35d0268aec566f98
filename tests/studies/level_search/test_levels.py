from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tnlm.allocation.candidate import Candidate
from tnlm.studies.level_search.levels import mutated, price_of, step_of

prices = st.lists(st.integers(1, 100), min_size=1, max_size=6, unique=True).map(sorted)


def curve_of(own):
    return [Candidate((), price, 1.0 / price) for price in own]


@given(st.lists(prices, min_size=1, max_size=6), st.integers(0, 10), st.integers(0, 50))
def test_mutations_stay_within_the_budget(units, seed, free):
    curves, draws = [curve_of(own) for own in units], random.Random(seed)
    state = tuple(draws.randrange(len(curve)) for curve in curves)
    budget = price_of(curves, state) + free
    for _ in range(5):
        state = mutated(curves, state, budget, step_of(curves), draws)
        assert price_of(curves, state) <= budget


def test_a_switch_moves_size_from_one_unit_to_another():
    curves = [curve_of([10, 20, 30, 40])] * 4
    state = (1, 1, 1, 1)
    seen = set()
    for seed in range(40):
        found = mutated(curves, state, 80, 10, random.Random(seed))
        assert price_of(curves, found) == 80
        seen.add(found)
    assert len(seen) > 10


def test_the_same_seed_draws_the_same():
    curves = [curve_of([10, 20, 30])] * 5
    twice = [mutated(curves, (1,) * 5, 100, 10, random.Random(3)) for _ in range(2)]
    assert twice[0] == twice[1] != (1,) * 5


def test_one_unit_has_nobody_to_switch_with():
    assert mutated([curve_of([10, 20])], (1,), 20, 5, random.Random(0)) == (1,)
