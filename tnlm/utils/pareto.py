"""The Pareto front: the points that no other point dominates."""

from __future__ import annotations

from collections.abc import Sequence

from tnlm.errors import EvaluationError, OptionError


def pareto(values: Sequence[Sequence[float]], maximize: Sequence[bool]) -> list[int]:
    """Return the indices of the points that no other point dominates.

    A point dominates another if it is at least as good in every objective and better in one. Equal
    points do not dominate each other: all of them stay.

    Args:
        values: the objective values of each point.
        maximize: for each objective, whether higher is better.

    Returns:
        The indices, in ascending order.

    Raises:
        OptionError: if a point does not have one value per objective.
        EvaluationError: if a value is NaN, which has no order.

    Example:
        >>> pareto([(1.0, 5.0), (2.0, 3.0), (2.0, 4.0)], [False, False])
        [0, 1]
    """
    costs = []
    for index, point in enumerate(values):
        if len(point) != len(maximize):
            raise OptionError(
                f"point {index} has {len(point)} values for {len(maximize)} objectives"
            )
        if any(value != value for value in point):
            raise EvaluationError(f"point {index} has a value that is not a number: {list(point)}")
        signed = zip(point, maximize, strict=True)
        costs.append(tuple(-value if more else value for value, more in signed))
    # In this order, a point can only be dominated by one before it.
    front: list[tuple[float, ...]] = []
    for cost in sorted(set(costs)):
        if not any(_at_least_as_good(other, cost) for other in front):
            front.append(cost)
    kept = set(front)
    return [index for index, cost in enumerate(costs) if cost in kept]


def _at_least_as_good(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))
