"""Error against size for every matrix, and the choices that one multiplier or tolerance makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tnlm.allocation.base import Problem
from tnlm.allocation.pricing import dense_cost, network_cost
from tnlm.allocation.uniform import options_for
from tnlm.calibration.metrics import Metric
from tnlm.decompositions.base import to_dict
from tnlm.errors import BudgetError
from tnlm.planning import LayerPlan
from tnlm.targets import Target

STEPS = 60
"""Halvings of a multiplier or a tolerance: to the last bit that matters."""


@dataclass(frozen=True)
class Candidate:
    """One thing that a matrix could become.

    Attributes:
        layer: the decision.
        price: its cost, in the unit of the budget.
        loss: its squared error, times the effect of that on the loss.
    """

    layer: LayerPlan
    price: float
    loss: float


Curve = list[Candidate]
"""The candidates of one matrix, cheapest first, each better than all cheaper ones."""


def curves(problem: Problem) -> list[Curve]:
    """Return the candidates of every target, with *dense* always the last of them."""
    return [_curve(problem, *each) for each in problem.each()]


def _curve(problem: Problem, target: Target, weight: Tensor, metric: Metric) -> Curve:
    limits, size = problem.limits, weight.element_size()
    dense = dense_cost(target, size)
    stays = LayerPlan(
        target.name,
        target.kind,
        target.shape,
        None,
        {},
        dense,
        dense,
        note="worth more than it costs",
    )
    extra = problem.extra(target)
    energy = metric.norm(weight) ** 2 * problem.importance(target)
    macs = math.inf if target.kind == "embedding" else limits.max_macs * target.params
    found = [Candidate(stays, limits.price(dense), 0.0)]
    for structure in problem.formats:
        if target.kind not in structure.kinds:
            continue
        options = options_for(target, structure, limits)
        for spec, error in structure.curve(weight, metric, options, macs):
            network = structure.network(target.shape, spec)
            after = network_cost(target, network, size, extra)
            if after.params > target.most:
                continue
            layer = replace(
                stays,
                format=structure.name,
                spec=to_dict(spec),
                after=after,
                error=error,
                note="",
                bias=extra > 0,
            )
            found.append(Candidate(layer, limits.price(after), energy * error**2))
    return _front(found)


def _front(found: Curve) -> Curve:
    """Keep what no cheaper candidate equals."""
    front: Curve = []
    for candidate in sorted(found, key=lambda c: (c.price, c.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    return front


def check_budget(problem: Problem, found: Sequence[Curve]) -> float:
    """Return the budget in its unit.

    Raises:
        BudgetError: if even the cheapest candidates exceed it.
    """
    limits = problem.limits
    dense = sum(curve[-1].price if curve[-1].layer.format is None else 0 for curve in found)
    dense = dense or 1.0
    least = sum(curve[0].price for curve in found)
    if least > limits.keep * dense:
        raise BudgetError(
            f"{limits.keep:.4g} of the targets' {limits.unit} cannot be met; the smallest that "
            f"these formats allow is {math.ceil(1e4 * least / dense) / 1e4:g}"
        )
    return limits.keep * dense


def at_multiplier(curve: Curve, multiplier: float) -> Candidate:
    """Return the candidate of least loss plus ``multiplier`` times price."""
    return min(curve, key=lambda c: (c.loss + multiplier * c.price, c.price))


def at_tolerance(curve: Curve, tolerance: float) -> Candidate:
    """Return the cheapest candidate whose relative error is within a tolerance."""
    return next(c for c in curve if (c.layer.error or 0.0) <= tolerance)


def least_within(
    found: Sequence[Curve],
    budget: float,
    choose: Callable[[Curve, float], Candidate],
    lowest: float,
    highest: float,
) -> list[Candidate]:
    """Return the choices at the smallest value of a knob whose price is within a budget.

    Args:
        found: candidates of every matrix.
        budget: the most that all choices may cost together.
        choose: what a matrix takes at a value of the knob; cheaper as the knob grows.
        lowest: a positive value; the search is on a logarithmic scale.
        highest: a value at which the budget is met.
    """
    low, high = math.log(lowest), math.log(highest)
    for _ in range(STEPS):
        middle = (low + high) / 2
        price = sum(choose(curve, math.exp(middle)).price for curve in found)
        low, high = (low, middle) if price <= budget else (middle, high)
    return [choose(curve, math.exp(high)) for curve in found]


def spend_rest(found: Sequence[Curve], chosen: list[Candidate], budget: float) -> list[Candidate]:
    """Spend what a multiplier leaves over, on the upgrades that gain most for their price."""
    chosen = list(chosen)
    left = budget - sum(candidate.price for candidate in chosen)
    while True:
        best: tuple[float, int, Any] = (0.0, -1, None)
        for index, (curve, now) in enumerate(zip(found, chosen, strict=True)):
            for candidate in curve:
                step = candidate.price - now.price
                if 0 < step <= left and (now.loss - candidate.loss) / step > best[0]:
                    best = ((now.loss - candidate.loss) / step, index, candidate)
        if best[2] is None:
            return chosen
        left -= best[2].price - chosen[best[1]].price
        chosen[best[1]] = best[2]
