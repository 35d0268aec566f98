from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.utils.hull import combinations, lower_hull

point = tuple


@st.composite
def choices(draw):
    """Choices by increasing price and decreasing loss."""
    count = draw(st.integers(1, 6))
    steps = st.lists(st.integers(1, 9), min_size=count, max_size=count)
    prices, losses = draw(steps), draw(steps)
    return [(sum(prices[: k + 1]), sum(losses[k:])) for k in range(count)]


@given(found=choices(), multiplier=st.floats(0.0, 20.0))
def test_the_best_at_every_multiplier_is_on_the_hull(found, multiplier):
    def total(choice):
        return choice[1] + multiplier * choice[0]

    assert min(map(total, lower_hull(found, point))) == pytest.approx(min(map(total, found)))


@given(parts=st.lists(choices(), min_size=1, max_size=3), multiplier=st.floats(0.0, 20.0))
def test_the_best_combination_at_every_multiplier_is_found(parts, multiplier):
    def total(chosen):
        return sum(loss + multiplier * price for price, loss in chosen)

    found = list(combinations(parts, point))
    assert min(map(total, found)) == pytest.approx(min(map(total, product(*parts))))
    prices = [sum(price for price, _ in chosen) for chosen in found]
    assert prices == sorted(prices)
