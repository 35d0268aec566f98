from __future__ import annotations

import pytest

from tnlm.allocation import allocations, get_allocation
from tnlm.compression.budget_rules import UNITS, check_shared
from tnlm.compression.choices import Budget
from tnlm.errors import BudgetError, OptionError


def refused(*arguments, error=OptionError):
    with pytest.raises(error) as caught:
        check_shared(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("allocation", allocations().values(), ids=lambda a: a.name)
@pytest.mark.parametrize("unit", UNITS)
def test_an_allocation_counts_in_its_own_units(allocation, unit):
    if unit in allocation.units:
        check_shared(allocation, Budget(unit=unit))
    else:
        text = refused(allocation, Budget(unit=unit), error=BudgetError)
        assert f"unit={unit!r} with allocation={allocation.name!r}; allowed: " in text
        assert text.endswith(", ".join(allocation.units))


@pytest.mark.parametrize("unit", ["param", "flops", 3])
def test_an_unknown_unit_names_the_known(unit):
    text = refused(get_allocation("loss"), Budget(unit=unit), error=BudgetError)
    assert f"unknown unit {unit!r}" in text
    assert "params" in text


@pytest.mark.parametrize("allocation", allocations().values(), ids=lambda a: a.name)
def test_only_uniform_works_to_a_tolerance(allocation):
    if allocation.name == "uniform":
        check_shared(allocation, Budget(tolerance=0.1))
    else:
        text = refused(allocation, Budget(tolerance=0.1), error=BudgetError)
        assert f"tolerance with allocation={allocation.name!r}" in text
        assert "allocation='uniform'" in text


@pytest.mark.parametrize("allocation", allocations().values(), ids=lambda a: a.name)
def test_blocks_are_counted_only_where_they_act(allocation):
    if allocation.counts_blocks:
        check_shared(allocation, Budget(blocks=3))
        for value in (0, -1, 1.0, True, "3"):
            text = refused(allocation, Budget(blocks=value))
            assert f"blocks={value!r}; allowed: a whole number >= 1" in text
    else:
        text = refused(allocation, Budget(blocks=3))
        assert f"blocks=3 has no effect with allocation={allocation.name!r}" in text


@pytest.mark.parametrize("allocation", allocations().values(), ids=lambda a: a.name)
def test_multiply_adds_are_limited_where_sizes_are_shared_out(allocation):
    if allocation.limits_macs:
        check_shared(allocation, Budget(max_macs=0.9))
    else:
        text = refused(allocation, Budget(max_macs=0.9), error=BudgetError)
        assert f"max_macs=0.9 with allocation={allocation.name!r}" in text
    check_shared(allocation, Budget(max_macs=1.0))
