"""Alternating least squares for any network, under any metric, one factor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from tnlm.decompositions.normal import Normal, inverse
from tnlm.decompositions.whitening import (
    Decompose,
    closed_form,
    is_plain,
    network_sides,
    rebuild,
    reshaped,
)
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.contraction import Pairwise, pairwise
from tnlm.tensors.network import Factors, Network

SWEEPS, STALL = 8, 2e-2
"""Most sweeps over all factors, and the relative gain below which a sweep is the last."""

STEPS, SPENT = 8, 0.05
"""The same for conjugate-gradient steps on a factor."""

ROUNDING = 1e-26
"""A squared error this small, relative to the weight's square, is rounding."""


class Fit(NamedTuple):
    """Factors, with the squared error in the metric at the start and after every half-step."""

    factors: Factors
    objective: list[float]


def fit_network(network: Network, weight: Tensor, metric: Metric, decompose: Decompose) -> Factors:
    """Fit a network: in closed form under the Frobenius norm, otherwise refined by ALS."""
    if is_plain(metric):
        return decompose(reshaped(network, weight))
    start, _ = closed_form(network, weight, metric, decompose)
    return als(network, weight, metric, start).factors


def als(
    network: Network,
    weight: Tensor,
    metric: Metric,
    start: Factors,
    *,
    sweeps: int = SWEEPS,
    stall: float = STALL,
    steps: int = STEPS,
    spent: float = SPENT,
) -> Fit:
    """Improve factors until the error in the metric stalls; it never increases.

    The matrix is linear in each factor, so each half-step is a least-squares problem with a
    symmetric normal operator, solved by conjugate gradients from the current factor. If the metric
    is separable over the modes, or the normal matrix is small, the preconditioner is the exact
    inverse, and one iteration solves the problem.

    Args:
        network: network of the factors.
        weight: ``(out, in)``.
        metric: how the error is measured.
        start: the factors to improve; left unchanged.
        sweeps: most passes over all factors.
        stall: a sweep that lowers the squared error by less than this fraction is the last.
        steps: most iterations on one factor.
        spent: an iteration that adds less than this fraction to its half-step's gain is the last.

    Source: alternating least squares with a weight matrix, as in weighted low-rank approximation
    (Srebro and Jaakkola, 2003); conjugate gradients: Hestenes and Stiefel, 1952.

    Example:
        >>> import torch
        >>> from tnlm.metrics.metric import InputMoment
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 3, "a": 1, "i": 2})
        >>> start = {"left": torch.ones(3, 1), "right": torch.ones(1, 2)}
        >>> weight = torch.tensor([[2.0, 4.0], [1.0, 2.0], [0.0, 0.0]])
        >>> fit = als(net, weight, InputMoment(torch.diag(torch.tensor([4.0, 1.0]))), start)
        >>> bool(torch.allclose(fit.factors["left"] @ fit.factors["right"], weight.double()))
        True
    """
    weight = weight.detach().double()
    factors = {name: start[name].detach().double() for name in network.factors}
    halves = half_steps(network, metric)
    state = State.of(weight - rebuild(network, factors), metric)
    floor = ROUNDING * metric.norm(weight) ** 2
    history = [state.objective]
    for _ in range(sweeps):
        before = history[-1]
        if before <= floor:
            break
        for half in halves:
            factors[half.name], state = half.improve(factors, state, steps, spent)
            history.append(state.objective)
        if before - history[-1] <= stall * before:
            break
        # Recompute the error, since updates accumulate rounding.
        state = State.of(weight - rebuild(network, factors), metric)
    return Fit(factors, history)


def half_steps(network: Network, metric: Metric) -> list[Half]:
    """Return the least-squares problems of all factors, in order."""
    sides = dict(zip(network.out + network.inp, network_sides(network, metric), strict=True))
    inverses = {mode: inverse(side.values) for mode, side in sides.items() if side is not None}
    return [Half.plan(network, name, metric, sides, inverses) for name in network.factors]


@dataclass(frozen=True)
class State:
    """The error E, its pull G E C, and their inner product, the objective."""

    error: Tensor
    pulled: Tensor
    objective: float

    @classmethod
    def of(cls, error: Tensor, metric: Metric, pulled: Tensor | None = None) -> State:
        """Return the state of an error."""
        pulled = metric.pull(error) if pulled is None else pulled
        return cls(error, pulled, float((error * pulled).sum()))


@dataclass(frozen=True)
class Half:
    """The least-squares problem of one factor, with the others fixed.

    The other factors form parts that only this factor connects; each part is contracted once per
    half-step. ``forward`` maps the factor to the matrix, ``adjoint`` the matrix to the factor.
    """

    name: str
    network: Network
    metric: Metric
    parts: tuple[Network, ...]
    forward: Pairwise
    adjoint: Pairwise
    normal: Normal

    @classmethod
    def plan(
        cls,
        network: Network,
        name: str,
        metric: Metric,
        sides: Mapping[str, Side | None],
        inverses: Mapping[str, Tensor],
    ) -> Half:
        """Return the problem of a named factor."""
        parts = tuple(_parts(network, name))
        others = {str(index): part.out for index, part in enumerate(parts)}
        modes, opened = network.factors[name], network.out + network.inp
        forward = replace(network, factors={name: modes, **others}, gauge=None)
        adjoint = Network({"error": opened, **others}, modes, "", network.sizes)
        plans = pairwise(forward), pairwise(adjoint)
        normal = Normal(network, name, metric, sides, inverses, tuple(others.values()))
        return cls(name, network, metric, parts, *plans, normal)

    def improve(
        self, factors: Factors, state: State, steps: int, spent: float, ridge: float = 0.0
    ) -> tuple[Tensor, State]:
        """Return a better factor with its state, or the current ones.

        A ridge adds ``ridge`` times the factor's squared norm to the objective.
        """
        others = [pairwise(part)([factors[k] for k in part.factors]) for part in self.parts]
        precondition = self.normal.inverse(others)
        opened = [self.network.sizes[mode] for mode in self.network.out + self.network.inp]
        factor, error, pulled = factors[self.name], state.error, state.pulled
        residual = self.adjoint([pulled.reshape(opened), *others])
        if ridge:
            residual = residual - ridge * factor
        towards = precondition(residual)
        slope = float((residual * towards).sum())
        direction, gained = towards, 0.0
        for _ in range(steps):
            change = self.forward([direction, *others]).reshape(error.shape)
            pull = self.metric.pull(change)
            curvature = float((change * pull).sum())
            if ridge:
                curvature += ridge * float(direction.square().sum())
            if not (slope > 0 and curvature > 0):
                break
            step = slope / curvature
            factor = factor + step * direction
            error, pulled = error - step * change, pulled - step * pull
            gained += step * slope
            if step * slope <= spent * gained and gained > step * slope:
                break
            residual = residual - step * self.adjoint([pull.reshape(opened), *others])
            if ridge:
                residual = residual - step * ridge * direction
            towards = precondition(residual)
            previous, slope = slope, float((residual * towards).sum())
            direction = towards + slope / previous * direction
        after = State.of(error, self.metric, pulled)
        size, before = (float(f.square().sum()) for f in (factor, factors[self.name]))
        if not after.objective + ridge * size < state.objective + ridge * before:
            return factors[self.name], state
        return factor, after


def _parts(network: Network, name: str) -> Iterator[Network]:
    """Yield the connected parts of a network without one factor, with their open modes."""
    opened = set(network.out + network.inp)
    groups: list[list[str]] = []
    for other, modes in network.factors.items():
        if other == name:
            continue
        bonds = set(modes) - opened
        linked = [g for g in groups if any(bonds & set(network.factors[k]) for k in g)]
        groups = [g for g in groups if g not in linked]
        groups.append([member for group in linked for member in group] + [other])
    for group in groups:
        factors = {member: network.factors[member] for member in group}
        loose = opened | set(network.factors[name])
        modes = "".join(dict.fromkeys("".join(factors.values())))
        yield Network(factors, "".join(m for m in modes if m in loose), "", network.sizes)
