from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.studies.design.schedules import PUBLISHED, spaced, spread, transpose


@given(st.integers(2, 40), st.integers(1, 40), st.data())
def test_transposed_layers_keep_their_order_and_ends(source, target, data):
    layers = data.draw(st.lists(st.integers(0, source - 1), min_size=1, unique=True))
    found = transpose(layers, source=source, target=target)
    assert set(found) <= set(range(target))
    assert len(found) <= len(layers)
    assert transpose(layers, source=source, target=source) == tuple(sorted(layers))
    for layer in layers:
        (image,) = transpose([layer], source=source, target=target)
        assert abs(image - layer * (target - 1) / (source - 1)) <= 0.5
    ends = transpose([0, source - 1], source=source, target=target)
    assert (ends[0], ends[-1]) == (0, target - 1)


def test_published_schedules_at_thirty_layers():
    found = [transpose(layers, target=30) for layers in PUBLISHED]
    assert found[0] == (2, 27)
    assert found[-1] == tuple(range(30))
    assert [len(layers) for layers in PUBLISHED] == [2, 3, 5, 7, 11, 16, 20, 25, 28, 32]
    assert [len(layers) for layers in found][:6] == [2, 3, 5, 7, 11, 16]


@given(st.integers(1, 30), st.data())
def test_spread_layers_are_even(total, data):
    count = data.draw(st.integers(1, total))
    found = spread(range(total), count)
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert len(set(found)) == count
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("distance", range(1, 7))
def test_spacings_of_the_paper(distance):
    assert spaced(2, distance, 5, depth=32) == tuple(2 + distance * k for k in range(5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transpose([32], target=30), "layer 32; a model of 32 layers has 0 to 31"),
        (lambda: transpose([0], target=0), "target=0; allowed: a whole number of at least 1"),
        (lambda: spaced(2, 6, 6, depth=32), "end at 32; the model has layers 0 to 31"),
        (lambda: spaced(2, 0, 6, depth=32), "distance=0; allowed: a whole number of at least 1"),
        (lambda: spread([1, 2], True), "count=True; allowed: a whole number"),
        (lambda: spread([1, 2], 3), "count=3; allowed: a whole number from 1 to 2"),
    ],
)
def test_impossible_schedules_are_refused(call, message):
    with pytest.raises(OptionError, match=message):
        call()
