"""Accelerated alternating least squares, for elementwise weights, where plain sweeps are slow."""

from __future__ import annotations

import math

from torch import Tensor

from tnlm.decompositions.als import ROUNDING, SPENT, STEPS, Fit, State, half_steps
from tnlm.decompositions.whitening import rebuild
from tnlm.metrics.metric import Metric
from tnlm.tensors.network import Factors, Network

SWEEPS = 200
"""Default for the most sweeps over all factors."""

WINDOW, STALL = 10, 1e-3
"""Sweeps also end when this many together gain less than this fraction of the objective."""


def accelerated(
    network: Network,
    weight: Tensor,
    metric: Metric,
    start: Factors,
    *,
    sweeps: int = SWEEPS,
    ridge: float = 0.0,
) -> Fit:
    """Improve factors until the objective stalls; it never increases.

    The objective is the squared error in the metric plus, with a ridge, λ times the sum of squares
    of all factors. λ is ``ridge`` times the root mean square of the weight, so that scaling the
    weight does not change the result's shape. The k-th sweep starts from the factors extrapolated
    along their last change by a fraction k / (k + 3). If that increases the objective, the sweep is
    discarded, and k restarts from 0.

    Args:
        network: network of the factors.
        weight: ``(out, in)``.
        metric: how the error is measured.
        start: the factors to improve; left unchanged.
        sweeps: most passes over all factors.
        ridge: see above; 0 for the error alone.

    Returns:
        The factors, and the objective at the start and after every sweep.

    Source: Nesterov acceleration of ALS with restarts, Mitchell, Ye and De Sterck 2020, arXiv
    1810.05846.

    Example:
        >>> import torch
        >>> from tnlm.metrics.metric import Elementwise
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 3, "a": 1, "i": 2})
        >>> start = {"left": torch.ones(3, 1), "right": torch.ones(1, 2)}
        >>> weight = torch.tensor([[2.0, 4.0], [1.0, 2.0], [0.0, 0.0]])
        >>> fit = accelerated(net, weight, Elementwise(torch.rand(3, 2) + 0.1), start)
        >>> fit.objective[-1] < 1e-6
        True
    """
    weight = weight.detach().double()
    factors = {name: start[name].detach().double() for name in network.factors}
    strength = ridge * float(weight.square().mean()) ** 0.5
    halves = half_steps(network, metric)
    state = State.of(weight - rebuild(network, factors), metric)
    floor = ROUNDING * metric.norm(weight) ** 2
    history, before, count = [_objective(state, factors, strength)], factors, 0
    for _ in range(sweeps):
        if history[-1] <= floor or _stalls(history):
            break
        moved, at = _moved(factors, before, count / (count + 3)), state
        if count:
            at = State.of(weight - rebuild(network, moved), metric)
        for half in halves:
            moved[half.name], at = half.improve(moved, at, STEPS, SPENT, strength)
        # Recompute the error, since updates accumulate rounding.
        at = State.of(weight - rebuild(network, moved), metric)
        reached = _objective(at, moved, strength)
        if reached < history[-1]:
            before, factors, state, count = factors, moved, at, count + 1
        elif count == 0:  # a plain sweep gains nothing
            break
        else:
            before, count = factors, 0
        history.append(min(reached, history[-1]))
    return Fit(factors, history)


def _objective(state: State, factors: Factors, strength: float) -> float:
    squares = sum(float(factor.square().sum()) for factor in factors.values()) if strength else 0.0
    return state.objective + strength * squares


def _stalls(history: list[float]) -> bool:
    earlier = history[-1 - WINDOW] if len(history) > WINDOW else math.inf
    return earlier - history[-1] <= STALL * history[-1]


def _moved(factors: Factors, before: Factors, share: float) -> Factors:
    """Extrapolate factors by a fraction of their last change."""
    return {name: factor + share * (factor - before[name]) for name, factor in factors.items()}
