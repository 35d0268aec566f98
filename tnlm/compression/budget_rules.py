"""Rules for budgets: their values, their units, and what an allocation can share out."""

from __future__ import annotations

from collections.abc import Sequence

from tnlm.allocation.base import Allocation
from tnlm.allocation.clock import Workload
from tnlm.compression.choices import Budget
from tnlm.compression.rules import is_number, is_word
from tnlm.errors import BudgetError, OptionError, did_you_mean
from tnlm.utils.checks import is_whole

BUDGETS = ("keep", "keep_targets", "tolerance")
UNITS = ("params", "bytes", "macs", "time")


def check_shared(allocation: Allocation, budget: Budget, usual: str = "params") -> str:
    """Return the unit of the budget.

    Args:
        allocation: shares the budget out.
        budget: the budget.
        usual: the unit of a budget that names none.

    Raises:
        OptionError: unless the allocation supports the budget in this unit.
    """
    unit, blocks = usual if budget.unit is None else budget.unit, budget.blocks
    if not is_word(unit, UNITS):
        raise BudgetError(f"unknown unit {unit!r}{did_you_mean(str(unit), UNITS)}")
    if unit not in allocation.units:
        raise BudgetError(
            f"unit={unit!r} with allocation={allocation.name!r}; allowed: "
            + ", ".join(allocation.units),
            argument=("unit", "allocation"),
        )
    if budget.tolerance is not None and not allocation.tolerates:
        raise BudgetError(
            f"tolerance with allocation={allocation.name!r}, which needs a budget to split; pass "
            "keep or keep_targets, or allocation='uniform'",
            argument=("tolerance", "keep", "keep_targets", "allocation"),
        )
    if budget.max_macs < 1 and not allocation.limits_macs:
        raise BudgetError(
            f"max_macs={budget.max_macs:g} with allocation={allocation.name!r}, which has one "
            "threshold for all matrices; leave it out",
            argument=("max_macs", "allocation"),
        )
    if blocks is None:
        return unit
    if not allocation.counts_blocks:
        raise OptionError(
            f"blocks={blocks!r} has no effect with allocation={allocation.name!r}",
            argument=("blocks", "allocation"),
        )
    if not is_whole(blocks) or blocks < 1:
        raise OptionError(f"blocks={blocks!r}; allowed: a whole number >= 1", argument="blocks")
    return unit


def check_time(budget: Budget, unit: str, precision: str | None) -> Workload | None:
    """Return the workload of a budget in time; None for other units.

    Raises:
        OptionError: if the workload is unknown, or the arguments have no effect or no prediction.
    """
    if unit != "time":
        for name in ("workload", "prices"):
            if getattr(budget, name) is not None:
                raise OptionError(
                    f"{name}= has no effect with unit={unit!r}; allowed with unit='time'",
                    argument=(name, "unit"),
                )
        return None
    if precision is not None:
        raise OptionError(
            f"unit='time' with precision={precision!r}, whose time is not predicted; leave out one",
            argument=("unit", "precision"),
        )
    return Workload.parse("decode" if budget.workload is None else budget.workload)


def check_budgets(budget: Budget, sizes: Sequence[str]) -> None:
    """Raise `BudgetError` unless at most one budget is given, and it is a fraction."""
    values = {name: getattr(budget, name) for name in BUDGETS}
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) > 1:
        raise BudgetError(
            f"{' and '.join(given)} given; allowed: one of {', '.join(BUDGETS)}", argument=BUDGETS
        )
    for name, value in given.items():
        if not is_number(value) or not 0 < value <= 1:
            raise BudgetError(f"{name}={value!r}; allowed: a fraction in (0, 1]", argument=name)
    if budget.tolerance is not None and sizes:
        raise BudgetError(
            f"tolerance and {sizes[0]} given; a tolerance determines {sizes[0]}",
            argument=("tolerance", sizes[0]),
        )
    if not is_number(budget.max_macs) or not budget.max_macs > 0:
        raise BudgetError(
            f"max_macs={budget.max_macs!r}; allowed: a number > 0, or inf", argument="max_macs"
        )
