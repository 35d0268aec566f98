from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import EvaluationError, OptionError
from tnlm.utils.pareto import pareto

VALUES = st.integers(0, 6).map(float)


def dominates(one, other, maximize):
    better = [a > b if more else a < b for a, b, more in zip(one, other, maximize, strict=True)]
    worse = [a < b if more else a > b for a, b, more in zip(one, other, maximize, strict=True)]
    return any(better) and not any(worse)


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.tuples(
            st.lists(st.tuples(*[VALUES] * n), max_size=14), st.tuples(*[st.booleans()] * n)
        )
    )
)
def test_the_front_is_what_nothing_dominates(drawn):
    points, maximize = drawn
    wanted = [
        index
        for index, point in enumerate(points)
        if not any(dominates(other, point, maximize) for other in points)
    ]
    assert pareto(points, maximize) == wanted
    assert bool(wanted) == bool(points)


def test_broken_points_are_refused():
    with pytest.raises(OptionError, match="point 1 has 1 values for 2 objectives"):
        pareto([(1.0, 2.0), (1.0,)], [False, True])
    with pytest.raises(EvaluationError, match="point 0 has a value that is not a number"):
        pareto([(math.nan, 2.0)], [False, True])
