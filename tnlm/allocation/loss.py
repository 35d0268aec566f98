"""Loss-aware allocation: the least predicted loss increase, over all matrices and formats."""

from __future__ import annotations

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.curves import at_multiplier, check_budget, curves, least_within, spend_rest
from tnlm.plans.plan import LayerPlan


class LossAware(Allocation):
    """Minimise the predicted increase of the loss under one budget, by a Lagrange multiplier.

    The predicted loss of a candidate is its squared error in the metric times the effect of a unit
    of that error on the loss; the two-sided metric includes the effect already. Every matrix takes
    the candidate, or stays dense, with the least loss plus multiplier times price; the multiplier
    is found by bisection. The rest of the budget buys the best single upgrades.

    Source: the Lagrangian of optimal bit allocation (Shoham and Gersho, 1988); spectra weighted by
    the loss as in IO-SVD (arXiv 2605.15626).
    """

    name = "loss"
    title = "least predicted loss increase, over all matrices"
    weighs_loss = True
    units = (*Allocation.units, "time")
    chooses_bits = True

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Choose the multiplier that just meets the budget."""
        found = curves(problem)
        budget = check_budget(problem, found)
        largest = max((curve[0].loss for curve in found), default=0.0) or 1.0
        chosen = least_within(found, budget, at_multiplier, 1e-30 * largest, 2.0 * largest)
        chosen = spend_rest(found, chosen, budget)
        return [layer for candidate in chosen for layer in candidate.layers]


ALLOCATION = LossAware()
