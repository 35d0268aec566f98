"""ZS-SVD's allocation: components of all matrices are dropped so that the loss stays in balance."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.uniform import decide, options_for, stay_dense
from tnlm.decompositions.base import Format, from_dict
from tnlm.errors import BudgetError, OptionError
from tnlm.metrics.metric import Metric
from tnlm.metrics.named.sloped import Sloped
from tnlm.metrics.several import Several
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target

EXACT = 1e-12
"""Relative rounding of a budget that is not an excess."""


def drop(
    changes: Sequence[Sequence[float]], prices: Sequence[Sequence[int]], most: int
) -> list[int]:
    """Return how many components each matrix keeps.

    Components leave a matrix in the order of their singular values, smallest first. Among the next
    of all matrices, the one whose predicted change of the loss is smallest leaves, of those that
    lower the loss if the sum of all changes so far is positive, and of those that raise it
    otherwise. A matrix keeps at least one.

    Args:
        changes: for every matrix, the change of the loss by dropping each component, largest
            singular value first.
        prices: for every matrix, its price with 0, 1, ... components, as many as it has or dense.
        most: the price that all matrices together must meet.

    Raises:
        BudgetError: if they do not meet it with one component each.

    Source: ZS-SVD, Abbasi et al. 2026, arXiv 2602.02848.

    Example:
        >>> drop([[5.0, -1.0], [5.0, 2.0], [5.0, 1.5]], [[0, 1, 2]] * 3, most=4)
        [1, 2, 1]
    """
    kept = [len(own) for own in changes]
    price = sum(own[count] for own, count in zip(prices, kept, strict=True))
    queues: tuple[list[tuple[float, int]], list[tuple[float, int]]] = ([], [])  # falls, rises
    total = 0.0

    def offer(matrix: int) -> None:
        if kept[matrix] > 1:
            change = changes[matrix][kept[matrix] - 1]
            heapq.heappush(queues[change > 0], (abs(change), matrix))

    for matrix in range(len(changes)):
        offer(matrix)
    while price > most:
        falls, rises = queues
        wanted, other = (rises, falls) if total <= 0 else (falls, rises)
        if not (wanted or other):
            raise BudgetError(
                f"one component of each matrix has {price:,} parameters, more than {most:,}; "
                "raise keep_targets="
            )
        _, matrix = heapq.heappop(wanted or other)
        total += changes[matrix][kept[matrix] - 1]
        kept[matrix] -= 1
        price += prices[matrix][kept[matrix]] - prices[matrix][kept[matrix] + 1]
        offer(matrix)
    return kept


class ZeroSum(Allocation):
    """Drop singular components of all matrices while the predicted loss stays where it is."""

    name = "zero-sum"
    title = "singular components by the first-order change of the loss, kept near zero (ZS-SVD)"
    units = ("params",)
    formats = frozenset({"low-rank"})
    metric = "sloped-input"
    takes_sizes = False

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Choose the rank of every matrix, then decide on each."""
        structure, limits = problem.formats[0], problem.limits

        def options(
            target: Target, weight: Tensor, metric: Metric
        ) -> tuple[list[float], list[int]]:
            prices = _prices(problem, structure, target)
            return _changes(target, weight, metric)[: len(prices) - 1], prices

        found = list(replace(problem, joint=()).map(options))
        dense = sum(target.params for target, _ in found)
        most = math.floor(limits.keep * dense * (1 + EXACT))
        ranks = drop([own for _, (own, _) in found], [own for _, (_, own) in found], most)
        chosen = dict(zip((target.name for target, _ in found), ranks, strict=True))

        def layer(target: Target, weight: Tensor, metric: Metric) -> LayerPlan:
            rank = chosen[target.name]
            if rank == 0:
                note = f"no rank needs at most max_macs={limits.max_macs:g} of its multiply-adds"
                return stay_dense(target, weight, note)
            if rank == min(target.shape):
                return stay_dense(target, weight, "none of its components was dropped")
            own = replace(limits, keep=1.0, options={**limits.options, "rank": rank})
            return decide(target, weight, metric, structure, own, predict=problem.predict)

        quiet = replace(problem, joint=(), progress=False)
        return [decided for _, decided in quiet.map(layer)]


def _changes(target: Target, weight: Tensor, metric: Metric) -> list[float]:
    """Return the change of the loss by dropping each component; of experts, of all together."""
    if isinstance(metric, Several):
        parts = [
            _changes(target, matrix, part())
            for matrix, part in zip(weight, metric.parts, strict=True)
        ]
        return [sum(changes) for changes in zip(*parts, strict=True)]
    if not isinstance(metric, Sloped):
        raise OptionError(
            f"{target.name}: no gradient is known of a {target.kind}, which allocation='zero-sum' "
            "needs; name it in ignore=",
            argument=("allocation", "ignore"),
        )
    found: list[float] = metric.changes(weight).tolist()
    return found


def _prices(problem: Problem, structure: Format[Any], target: Target) -> list[int]:
    """Return the parameters at rank 0, 1, ... that multiply-adds allow; dense at full rank."""
    limits, structure = problem.limits, target.taken(structure)
    options = options_for(target, structure, limits)
    specs = [
        from_dict(structure.spec, {**options, "rank": rank}) for rank in range(1, min(target.shape))
    ]
    costs = [target.cost(structure.network(target.shape, spec), 1) for spec in specs]
    if limits.max_macs < 1:
        most = target.most_macs(limits.max_macs)
        return [0, *(cost.params for cost in costs if cost.macs <= most)]
    return [0, *(min(cost.params, target.params) for cost in costs), target.params]


ALLOCATION = ZeroSum()
