from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.recovery.pruning.schedule import cubic


@given(
    lengths=st.tuples(st.integers(0, 9), st.integers(1, 30), st.integers(0, 9)),
    start=st.floats(0, 1),
    share=st.floats(0, 1),
)
def test_held_then_falling_then_held(lengths, start, share):
    warmup, between, cooldown = lengths
    end, steps = start * share, sum(lengths)
    values = [
        cubic(t, steps, start=start, end=end, warmup=warmup, cooldown=cooldown)
        for t in range(steps + 1)
    ]
    assert values[: warmup + 1] == pytest.approx([start] * (warmup + 1))
    assert values[warmup + between :] == [end] * (cooldown + 1)
    falls = [a - b for a, b in itertools.pairwise(values)]
    assert all(fall >= -1e-12 for fall in falls)
    slower = falls[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(slower))


@given(steps=st.integers(50, 400), warmup=st.floats(0, 0.4), cooldown=st.floats(0, 0.4))
def test_no_jump_anywhere(steps, warmup, cooldown):
    held, last = round(warmup * steps), round(cooldown * steps)
    values = [cubic(t, steps, end=0.2, warmup=held, cooldown=last) for t in range(steps + 1)]
    steepest = 3 * 0.8 / (steps - held - last)
    assert all(a - b <= steepest + 1e-12 for a, b in itertools.pairwise(values))


def test_flat_where_it_ends():
    before, at = (cubic(t, 1000, end=0.5, cooldown=100) for t in (899, 900))
    assert before - at < 1e-8
    assert cubic(450, 1000, end=0.5, cooldown=100) == pytest.approx(0.5 + 0.5 / 8)


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"cooldown": -1}, {"warmup": 6, "cooldown": 5}])
def test_counts_that_do_not_fit(wrong):
    with pytest.raises(OptionError, match="may not exceed steps"):
        cubic(0, 10, end=0.0, **wrong)
