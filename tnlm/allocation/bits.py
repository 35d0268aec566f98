"""Spreads the candidates of every target over the grids on which they may be stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tnlm.allocation.base import Problem
from tnlm.allocation.candidate import Candidate
from tnlm.allocation.uniform import reprice
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.precision.grid import Precision, least_bytes
from tnlm.precision.noise import Noise
from tnlm.targets.base import Target
from tnlm.targets.rounding import rounded
from tnlm.tensors.network import Network
from tnlm.utils.residency import resident

SIZE = 0.7
"""Fraction of a matrix's parameters at which the rounding of its factors is measured."""
GRID = Precision(4)
"""The grid on which it is measured: the ratio to a dense matrix is about the same on all."""

Choices = Sequence[tuple[Candidate, Network | None]]
"""Candidates of one layer each, with the network of each; None where it is dense."""


def on_grid(
    target: Target, layer: LayerPlan, network: Network | None, grid: Precision, itemsize: int
) -> LayerPlan:
    """Return a decision with the codes of its layers on a grid, and their bytes."""
    shapes = target.packed_shapes(network)
    plain = sum(rows * columns for rows, columns in shapes) * itemsize
    saved = plain - least_bytes(shapes, grid, itemsize)
    after = replace(layer.after, bytes=layer.after.bytes - saved)
    return replace(layer, after=after, precision=grid.to_dict(), note="")


def all_on_grid(
    problem: Problem, layers: Sequence[LayerPlan], grid: Precision | None
) -> list[LayerPlan]:
    """Return decisions on one grid, except those that have one already or cannot be packed."""
    known = {target.name: target for target in (*problem.targets, *problem.joint)}
    return [stored(known[layer.name], layer, grid) for layer in layers]


def stored(target: Target, layer: LayerPlan, grid: Precision | None) -> LayerPlan:
    """Return a decision on a grid, unless it has one already or cannot be packed."""
    if grid is None or layer.precision is not None or not target.packs(layer.format):
        return layer
    size = layer.before.bytes // layer.before.params
    return on_grid(target, layer, network_of_plan(target, layer), grid, size)


def network_of_plan(target: Target, layer: LayerPlan) -> Network | None:
    """Return the network that a decision puts in a target's place; None if it stays dense."""
    if layer.format is None:
        return None
    structure = get_format(layer.format)
    return structure.network(target.shape, from_dict(structure.spec, layer.spec))


def repriced(target: Target, weight: Tensor, layer: LayerPlan) -> LayerPlan:
    """Check a decision made elsewhere, bits included, and return it with its costs.

    Raises:
        OptionError: if the matrix cannot have the format, the spec or the precision.
    """
    priced = reprice(target, weight, layer)
    if layer.grid is None:
        return priced
    if not target.packs(layer.format):
        raise OptionError(f"{target.name}: a {target.kind} target cannot be stored in few bits")
    network = network_of_plan(target, priced)
    return on_grid(target, priced, network, layer.grid, weight.element_size())


class Bits:
    """What rounding adds to the loss of every candidate.

    The error of a dense matrix on a grid is predicted. That of factors is larger by a ratio that is
    measured once for each format and kind of matrix, in the middle block: one candidate is fitted
    and rounded.
    """

    def __init__(self, problem: Problem) -> None:
        """Prepare for the targets of a problem."""
        self._problem = problem
        self._losses: dict[str, list[float]] = {}
        self._ratios: dict[tuple[str, str], float] = {}
        alike: dict[str, list[Target]] = {}
        for target in problem.targets:
            alike.setdefault(_kind(target), []).append(target)
        self._middle = {kind: each[len(each) // 2] for kind, each in alike.items()}

    def spread(
        self, choices: Choices, target: Target, weight: Tensor, metric: Metric
    ) -> list[Candidate]:
        """Return the candidates of a target on every grid of the problem."""
        if tuple(self._problem.grids) == (None,) or not target.packs(None):
            return [candidate for candidate, _ in choices]
        energy = self._energy(target, weight, metric)
        rounding = self._rounding(target, weight, metric)
        found = []
        for candidate, network in choices:
            (layer,) = candidate.layers
            scale = self._scale(target, layer, choices)
            for grid, lost in zip(self._problem.grids, rounding, strict=True):
                if grid is None:
                    found.append(candidate)
                    continue
                coded = on_grid(target, layer, network, grid, weight.element_size())
                loss = candidate.loss + scale * lost
                coded = replace(coded, error=(loss / energy) ** 0.5 if energy else 0.0)
                found.append(Candidate((coded,), self._problem.limits.price(coded.after), loss))
        return found

    def _energy(self, target: Target, weight: Tensor, metric: Metric) -> float:
        return metric.norm(weight) ** 2 * self._problem.importance(target)

    def _rounding(self, target: Target, weight: Tensor, metric: Metric) -> list[float]:
        """Return the loss that rounding the dense matrices adds, on every grid."""
        if len(target.members) > 1:
            parts = [self._losses[member.name] for member in target.members]
            return [sum(each) for each in zip(*parts, strict=True)]
        noise, effect = _noise(weight, metric), self._problem.importance(target)
        self._losses[target.name] = [
            0.0 if grid is None else effect * noise.squared(grid) for grid in self._problem.grids
        ]
        return self._losses[target.name]

    def _scale(self, target: Target, layer: LayerPlan, choices: Choices) -> float:
        """Return how much more a candidate loses by rounding than the dense matrix."""
        if layer.format is None:
            return 1.0
        if len(target.members) > 1:  # plain layers with fewer channels
            return layer.keep
        kind = _kind(target), layer.format
        if kind not in self._ratios:
            sized = [c.layers[0] for c, _ in choices if c.layers[0].format == layer.format]
            chosen = min(sized, key=lambda each: abs(each.keep - SIZE))
            self._ratios[kind] = self._measured(self._middle[kind[0]], chosen)
        return self._ratios[kind]

    def _measured(self, target: Target, layer: LayerPlan) -> float:
        """Fit and round one candidate, and return its squared error of rounding over dense's."""
        model, metric = self._problem.model, self._problem.metric(target)
        with resident(model, target.module):
            weight = target.weight(model)
            fitted = target.fit(model, replace(layer, name=target.name), metric)
            after = rounded(fitted, GRID, lambda _: metric, weight).error
            dense = _noise(weight, metric).squared(GRID) / (metric.norm(weight) ** 2 or 1.0)
        return max(after**2 - fitted.error**2, 0.0) / dense if dense else 1.0


def _noise(weight: Tensor, metric: Metric) -> Noise:
    """Return the expected error of rounding under the nearest separable metric."""
    inputs, outputs = metric.start().inputs, metric.start().outputs
    rows = None
    if outputs is not None:
        rows = outputs.values if outputs.is_diagonal else outputs.values.diagonal()
    return Noise(weight, None if inputs is None else inputs.values, rows)


def _kind(target: Target) -> str:
    """Return what the same matrix has in common in all blocks."""
    return re.sub(r"\d+", "#", target.name) + f" {target.shape}"
