"""Energy allocation: every matrix is cut to the same relative error."""

from __future__ import annotations

from operator import attrgetter

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.curves import (
    at_tolerance,
    by_tolerance,
    check_budget,
    curves,
    least_within,
)
from tnlm.plans.plan import LayerPlan


class Energy(Allocation):
    """Cut every matrix to the same relative error in its metric, the smallest within the budget.

    Source: the energy threshold on squared singular values that SVD-based methods use.
    """

    name = "energy"
    title = "the same relative error for every matrix"
    units = (*Allocation.units, "time")

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Find the common relative error by bisection."""
        found = curves(problem, attrgetter("error"), by_tolerance)
        budget = check_budget(problem, found)
        worst = max(1.0, *(curve[0].error for curve in found))
        chosen = least_within(found, budget, at_tolerance, 1e-12, worst * (1.0 + 1e-9))
        return [layer for candidate in chosen for layer in candidate.layers]


ALLOCATION = Energy()
