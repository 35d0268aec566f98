"""Loss-aware allocation: the least predicted loss increase, over all matrices and formats."""

from __future__ import annotations

from collections.abc import Sequence

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.candidate import Candidate
from tnlm.allocation.curves import (
    Curve,
    at_multiplier,
    check_budget,
    curves,
    least_within,
    spend_rest,
)
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
        chosen = least_loss(found, check_budget(problem, found))
        return [layer for candidate in chosen for layer in candidate.layers]


def least_loss(found: Sequence[Curve], budget: float) -> list[Candidate]:
    """Return the candidates of least predicted loss within a budget, one of each curve."""
    largest = max((curve[0].loss for curve in found), default=0.0) or 1.0
    chosen = least_within(found, budget, at_multiplier, 1e-30 * largest, 2.0 * largest)
    return spend_rest(found, chosen, budget)


ALLOCATION = LossAware()
