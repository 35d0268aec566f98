"""Switches of sizes between units of a model, within one budget."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tnlm.allocation.curves import Curve

MOST_SWITCHES = 3
"""Most switches of one mutation; their number is the smaller of two uniform draws."""
TRIES = 20
"""How often a switch is drawn again if it changes nothing."""
STEPS = 20
"""Steps between nothing and the size of an average unit."""

State = tuple[int, ...]
"""The candidate of every unit, as an index on its curve."""


def price_of(curves: Sequence[Curve], state: State) -> float:
    """Return the price of a state."""
    return sum(curve[index].price for curve, index in zip(curves, state, strict=True))


def step_of(curves: Sequence[Curve]) -> float:
    """Return the price by which a switch makes a unit cheaper."""
    return sum(curve[-1].price for curve in curves) / (STEPS * len(curves))


def mutated(
    curves: Sequence[Curve], state: State, budget: float, step: float, draws: random.Random
) -> State:
    """Return a state with one to three switches: a unit gets cheaper, and another dearer instead.

    The price stays within the budget. A switch takes the dearest candidate that is a step cheaper,
    and gives another unit the dearest candidate that the budget then allows, at most about as much
    dearer.

    Args:
        curves: the candidates of every unit, cheapest first.
        state: the parent.
        budget: the most that all units may cost.
        step: the price that a switch moves, at least.
        draws: seeded.

    Source: the level-switch mutation of EvoPress, Sieberling et al. 2024, arXiv 2410.14649; sizes
    there come in equal levels.
    """
    count = min(draws.randint(1, MOST_SWITCHES), draws.randint(1, MOST_SWITCHES))
    for _ in range(count):
        state = _switched(curves, state, budget, step, draws)
    return state


def _switched(
    curves: Sequence[Curve], state: State, budget: float, step: float, draws: random.Random
) -> State:
    free = budget - price_of(curves, state)
    for _ in range(TRIES):
        down, up = draws.randrange(len(curves)), draws.randrange(len(curves))
        lower = _within(curves[down], curves[down][state[down]].price - step)
        if down == up or lower is None:
            continue
        freed = curves[down][state[down]].price - curves[down][lower].price
        higher = _within(curves[up], curves[up][state[up]].price + freed + free)
        if higher is not None and higher > state[up]:
            changes = {down: lower, up: higher}
            return tuple(changes.get(unit, index) for unit, index in enumerate(state))
    return state


def _within(curve: Curve, price: float) -> int | None:
    """Return the dearest candidate that costs no more than a price."""
    found = [index for index, candidate in enumerate(curve) if candidate.price <= price]
    return found[-1] if found else None
