"""Error-size curves of matrices, and choices on them by one multiplier or one tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import Tensor

from tnlm.allocation.base import Limits, Problem
from tnlm.allocation.bits import Bits
from tnlm.allocation.candidate import Candidate
from tnlm.allocation.uniform import curve_of, stay_dense
from tnlm.decompositions.base import Format, to_dict
from tnlm.errors import BudgetError
from tnlm.metrics.metric import Metric
from tnlm.targets.base import Target
from tnlm.tensors.network import Network
from tnlm.utils.hull import combinations
from tnlm.utils.ties import RELATIVE, significant

STEPS = 60
"""Bisection steps on a multiplier or a tolerance, enough for full precision."""


Curve = list[Candidate]
"""The candidates of one matrix, cheapest first, each better than all cheaper ones."""

Harm = Callable[[Candidate], float]
"""The objective by which candidates are compared: their loss, or their error."""


def curves(
    problem: Problem,
    harm: Harm = attrgetter("loss"),
    together: Callable[[Sequence[Curve]], Curve] | None = None,
) -> list[Curve]:
    """Return the candidates of every target; the last of each has no error, like *dense*.

    If a joint target may replace several, these share one curve, with candidates of both kinds.

    Args:
        problem: the matrices.
        harm: the objective that a larger candidate must reduce.
        together: combines several curves into one; by default, :func:`by_multiplier`.

    Raises:
        RankError: if a target cannot have the options; the message names it.
    """
    combine, bits = together or by_multiplier, Bits(problem)
    found_alone = problem.map(
        lambda *each: _front(bits.spread(_candidates(problem, *each), *each), harm)
    )
    alone = {target.name: curve for target, curve in found_alone}
    replaced = problem.replaced
    parts: dict[str, list[Curve]] = {}
    for target in problem.targets:
        if target.name in replaced:
            parts.setdefault(replaced[target.name].name, []).append(alone[target.name])
    found: dict[str, Curve] = {}
    for target in problem.targets:
        unit = replaced.get(target.name)
        if unit is None:
            found[target.name] = alone[target.name]
        elif unit.name not in found:
            apart = combine(parts[unit.name])
            joined = [c for c in alone[unit.name] if c.layers[0].format is not None]
            found[unit.name] = _front([*apart, *joined], harm)
    return list(found.values())


def by_multiplier(parts: Sequence[Curve]) -> Curve:
    """Combine several curves: return the combinations that are optimal for some multiplier.

    Start with the cheapest candidates, then take the steps of the convex hulls in order of gain per
    price.
    """
    return [_combined(chosen) for chosen in combinations(parts, _point)]


def by_tolerance(parts: Sequence[Curve]) -> Curve:
    """Combine several curves: return the combinations in which all meet one tolerance."""
    levels = sorted({candidate.error for curve in parts for candidate in curve})
    return [_combined([at_tolerance(curve, level) for curve in parts]) for level in levels]


def _combined(chosen: Sequence[Candidate]) -> Candidate:
    layers = tuple(layer for candidate in chosen for layer in candidate.layers)
    return Candidate(layers, sum(c.price for c in chosen), sum(c.loss for c in chosen))


def _point(candidate: Candidate) -> tuple[float, float]:
    return candidate.price, candidate.loss


def _candidates(
    problem: Problem, target: Target, weight: Tensor, metric: Metric
) -> list[tuple[Candidate, Network | None]]:
    """Return the candidates of a target in the model's dtype, each with its network."""
    limits, size = problem.limits, weight.element_size()
    before = limits.timed(target.dense_cost(size), target)
    stays = stay_dense(target, weight, "worth more than it costs")
    stays = replace(stays, before=before, after=before)
    extra = problem.extra(target)
    energy = metric.norm(weight) ** 2 * problem.importance(target)
    macs = target.most_macs(limits.max_macs)
    dense = Candidate((stays,), limits.price(stays.before), 0.0)
    found: list[tuple[Candidate, Network | None]] = [(dense, None)]
    for structure in problem.formats:
        if target.kinds.isdisjoint(structure.kinds):
            continue
        sampled = curve_of(target, weight, metric, structure, limits, macs)
        for spec, network, error in [*sampled, *_without_gauge(target, structure, limits, sampled)]:
            after = target.cost(network, size, extra)
            if network.params < target.least:
                continue
            if after.params > target.most or after.macs > macs * target.share:
                continue
            after = limits.timed(after, target, network)
            layer = replace(
                stays,
                format=structure.name,
                spec=to_dict(spec),
                after=after,
                error=error,
                note="",
                bias=extra > 0,
            )
            candidate = Candidate((layer,), limits.price(after), energy * error**2)
            found.append((candidate, network))
    return found


def _without_gauge(
    target: Target,
    structure: Format[Any],
    limits: Limits,
    sampled: Sequence[tuple[Any, Network, float]],
) -> list[tuple[Any, Network, float]]:
    """Return the same matrices without identity blocks, if time counts and nobody fixed them.

    They have more parameters, but a small product takes less time than putting values in order.
    """
    if limits.clock is None or "gauge" in limits.options or "gauge" in target.fixed:
        return []
    used = target.taken(structure)
    found = [
        (replace(spec, gauge=False), error)
        for spec, network, error in sampled
        if any(one.gauge is not None for one in network.together)
    ]
    return [(spec, used.network(target.shape, spec), error) for spec, error in found]


def _front(found: Sequence[Candidate], harm: Harm) -> Curve:
    """Keep the candidates that are better than all cheaper ones."""
    front: Curve = []
    for candidate in sorted(found, key=lambda c: (c.price, significant(harm(c)))):
        if not front or harm(candidate) < harm(front[-1]) * (1.0 - RELATIVE):
            front.append(candidate)
    return front


def check_budget(problem: Problem, found: Sequence[Curve]) -> float:
    """Return the budget in its unit, as a whole number.

    Raises:
        BudgetError: if even the cheapest candidates exceed it.
    """
    limits = problem.limits
    sizes = [(t, t.weight(problem.model).element_size()) for t in problem.targets]
    dense = sum(limits.price(limits.timed(t.dense_cost(size), t)) for t, size in sizes)
    least = sum(curve[0].price for curve in found)
    budget = math.floor(limits.keep * dense * (1.0 + 1e-12))  # 0.29 of 100 is 29, not 28
    if least > budget:
        raise BudgetError(
            f"{limits.keep:.4g} of the targets' {limits.unit} cannot be met; the smallest fraction "
            f"that these formats allow is {math.ceil(1e4 * least / dense) / 1e4:g}"
        )
    return budget


def at_multiplier(curve: Curve, multiplier: float) -> Candidate:
    """Return the candidate with the least loss plus ``multiplier`` times price."""
    if math.isinf(multiplier):
        return curve[0]
    return min(curve, key=lambda c: (c.loss + multiplier * c.price, c.price))


def at_tolerance(curve: Curve, tolerance: float) -> Candidate:
    """Return the cheapest candidate whose relative error is within a tolerance."""
    return next(c for c in curve if c.error <= tolerance)


def least_within(
    found: Sequence[Curve],
    budget: float,
    choose: Callable[[Curve, float], Candidate],
    lowest: float,
    highest: float,
) -> list[Candidate]:
    """Find by bisection the smallest value of a parameter whose choices are within a budget.

    Args:
        found: candidates of every matrix.
        budget: the most that all choices may cost together.
        choose: returns a curve's candidate at a value; a larger value gives a cheaper one.
        lowest: lower end of the search, positive, since the scale is logarithmic.
        highest: upper end of the search, at which the budget is met.
    """
    low, high = math.log(lowest), math.log(highest)
    for _ in range(STEPS):
        middle = (low + high) / 2
        price = sum(choose(curve, math.exp(middle)).price for curve in found)
        low, high = (low, middle) if price <= budget else (middle, high)
    return [choose(curve, math.exp(high)) for curve in found]


def spend_rest(found: Sequence[Curve], chosen: list[Candidate], budget: float) -> list[Candidate]:
    """Spend the rest of the budget on the upgrades with the best gain per price."""
    chosen = list(chosen)
    left = budget - sum(candidate.price for candidate in chosen)
    while True:
        best: tuple[float, int, Any] = (0.0, -1, None)
        for index, (curve, now) in enumerate(zip(found, chosen, strict=True)):
            for candidate in curve:
                step = candidate.price - now.price
                gain = (now.loss - candidate.loss) / step if 0 < step <= left else 0.0
                if gain > best[0] * (1.0 + RELATIVE):
                    best = (gain, index, candidate)
        if best[2] is None:
            return chosen
        left -= best[2].price - chosen[best[1]].price
        chosen[best[1]] = best[2]
