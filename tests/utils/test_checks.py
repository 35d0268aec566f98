from __future__ import annotations

import pytest

from tnlm.errors import OptionError, RankError
from tnlm.utils.checks import check_whole, is_real


@pytest.mark.parametrize("value", [0, -1, True, False, 1.0, "1", None, float("nan")])
def test_what_is_not_a_whole_number_of_at_least_one_is_refused(value):
    with pytest.raises(OptionError, match=r"steps=.*; allowed: a whole number of at least 1$"):
        check_whole("steps", value)


def test_bounds_are_allowed_and_named():
    check_whole("d", 2, 2, 5)
    check_whole("d", 5, 2, 5)
    with pytest.raises(RankError, match=r"^d=6; allowed: a whole number from 2 to 5$"):
        check_whole("d", 6, 2, 5, error=RankError)


@pytest.mark.parametrize("value", [True, "1", None, float("inf"), float("nan"), 1j])
def test_only_finite_numbers_are_real(value):
    assert not is_real(value)
