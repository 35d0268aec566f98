"""Even allocation: what can shrink keeps the same fraction, and meets the whole budget alone."""

from __future__ import annotations

from dataclasses import replace

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.uniform import ALLOCATION as UNIFORM
from tnlm.errors import BudgetError, OptionError
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan, total

STEPS = 20
"""Halvings of the fraction: finer than one channel in a million."""


class Even(Allocation):
    """Give everything that can shrink the same fraction, so that all matrices meet the budget.

    Where no format replaces a matrix it stays dense, and ``uniform`` misses the budget by it; here
    the others make up for it. Layers of one shape get one size, as runtimes need whose config has
    one width for all blocks.
    """

    name = "even"
    title = "the same fraction of what can shrink, to meet the whole budget"
    units = ("params", "macs")

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Find the largest fraction that meets the budget.

        Raises:
            BudgetError: if what stays dense is more than the budget; gives the least possible.
            OptionError: for several formats of one kind, between which it cannot choose.
        """
        _check_formats(problem)
        limits = problem.limits
        unseen = replace(problem, metric=lambda _: Metric(), predict=False, progress=False)

        def kept(fraction: float) -> float:
            tried = UNIFORM.allocate(replace(unseen, limits=replace(limits, keep=fraction)))
            before = limits.price(total(layer.before for layer in tried))
            return limits.price(total(layer.after for layer in tried)) / before

        low, high, least = 0.0, 1.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            found = kept(middle)
            least = min(least, found)
            low, high = (middle, high) if found <= limits.keep else (low, middle)
        if low == 0.0:
            raise BudgetError(
                f"keep_targets={limits.keep:.3f}, but the least possible with allocation='even' is "
                f"{least:.3f}, as some matrices stay dense",
                argument=("keep_targets", "allocation"),
            )
        return UNIFORM.allocate(replace(problem, limits=replace(limits, keep=low)))


def _check_formats(problem: Problem) -> None:
    for target in (*problem.targets, *problem.joint):
        names = [each.name for each in problem.formats if target.kinds & each.kinds]
        if len(names) > 1:
            raise OptionError(
                f"allocation='even' with {' and '.join(names)}, which both replace {target.name}; "
                "allowed: one format for each kind of target, or allocation='loss'",
                argument="allocation",
            )


ALLOCATION = Even()
