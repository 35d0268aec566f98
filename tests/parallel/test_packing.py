"""Greedy bin packing: groups stay together, and no bin is far above the others."""

from hypothesis import given
from hypothesis import strategies as st

from tnlm.parallel.packing import pack

TASKS = st.lists(st.tuples(st.integers(1, 99), st.sampled_from("abcdefgh")), max_size=30)


@given(TASKS, st.integers(1, 5))
def test_bins_are_balanced_up_to_one_group(tasks, bins):
    costs, groups = [cost for cost, _ in tasks], [group for _, group in tasks]
    found = pack(costs, groups, bins)
    assert len({*zip(groups, found, strict=True)}) == len({*groups})
    loads, sizes = [0] * bins, dict.fromkeys(groups, 0)
    for cost, group, place in zip(costs, groups, found, strict=True):
        loads[place] += cost
        sizes[group] += cost
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_the_longest_goes_first():
    assert pack([1, 1, 2], "abc", 2) == [1, 1, 0]
