"""Uniform allocation: the same fraction, tolerance or rank for every matrix."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from tnlm.allocation.base import Allocation, Limits, Problem
from tnlm.allocation.unseen import roomiest
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling, Format, from_dict, to_dict
from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target
from tnlm.tensors.network import Network
from tnlm.utils.ties import EXACT, least


def decide(
    target: Target,
    weight: Tensor,
    metric: Metric,
    structure: Format[Any],
    limits: Limits,
    *,
    predict: bool,
    extra: int = 0,
) -> LayerPlan:
    """Choose the spec with the least error within the limits, or keep the matrix dense.

    Args:
        target: the matrix.
        weight: its ``(out, in)`` values; on the meta device, the roomiest spec is chosen.
        metric: how its error is measured.
        structure: the format that replaces it.
        limits: limits on its cost.
        predict: whether to compute the error even if there is only one choice.
        extra: size of a bias added to the matrix, which counts.

    Raises:
        RankError: if the matrix cannot have the options; the message names the target.
    """
    before = target.dense_cost(weight.element_size())
    structure = target.taken(structure)
    try:
        specs = _specs(target, weight, metric, structure, limits, extra)
        if not specs:
            note = _why_dense(target, weight, metric, structure, limits, extra)
            return stay_dense(target, weight, note)
        errors: Sequence[float | None] = [None]
        if weight.is_meta:  # no values yet: training from scratch
            specs = [roomiest(target.shape, structure, specs)]
        elif limits.tolerance is not None:
            specs = [min(specs, key=lambda spec: structure.network(target.shape, spec).params)]
        if predict or len(specs) > 1:
            errors = structure.errors(weight, metric, specs)
    except OptionError as error:
        raise name_target(target, error) from error
    scores = [math.inf if error is None else error for error in errors]
    best = least(scores, EXACT)
    network = structure.network(target.shape, specs[best])
    after = target.cost(network, weight.element_size(), extra)
    return LayerPlan(
        target.name,
        target.kind,
        target.shape,
        structure.name,
        to_dict(specs[best]),
        before,
        after,
        errors[best],
        bias=extra > 0,
    )


def name_target(target: Target, error: OptionError) -> OptionError:
    """Return an options error that names the target, and what to do."""
    return type(error)(
        f"{target.name}: {error}; choose options that fit all targets, or name it in ignore=",
        argument=(*error.arguments, "ignore"),
    )


def curve_of(
    target: Target,
    weight: Tensor,
    metric: Metric,
    structure: Format[Any],
    limits: Limits,
    macs: float,
) -> list[tuple[Any, Network, float]]:
    """Return specs of growing size for a target, with their networks and relative errors.

    Raises:
        OptionError: if the target cannot have the options; names it.
    """
    options = options_for(target, structure, limits)
    structure = target.taken(structure)
    try:
        sampled = structure.curve(weight, metric, options, macs)
    except OptionError as wrong:
        raise name_target(target, wrong) from wrong
    return [(spec, structure.network(target.shape, spec), error) for spec, error in sampled]


def stay_dense(target: Target, weight: Tensor, note: str) -> LayerPlan:
    """Return the decision to keep a target dense, with the reason."""
    cost = target.dense_cost(weight.element_size())
    return LayerPlan(target.name, target.kind, target.shape, None, {}, cost, cost, note=note)


def reprice(target: Target, weight: Tensor, layer: LayerPlan) -> LayerPlan:
    """Check a decision made elsewhere, and return it with its costs.

    Raises:
        OptionError: if the matrix cannot have the format or spec, or would not shrink.
    """
    before = target.dense_cost(weight.element_size())
    if layer.format is None:
        return replace(layer, kind=target.kind, before=before, after=before)
    try:
        structure = get_format(layer.format)
        if target.kinds.isdisjoint(structure.kinds):
            raise OptionError(f"{structure.name} cannot replace a {target.kind} target")
        spec = from_dict(structure.spec, layer.spec)
        network = target.taken(structure).network(target.shape, spec)
        for name, allowed in target.fixed.items():
            if getattr(spec, name, allowed) != allowed:
                raise OptionError(
                    f"{name}={getattr(spec, name)!r}; allowed here: {allowed!r}", argument=name
                )
        if target.cost(network, 1).params > target.most:
            raise OptionError(f"{dict(layer.spec)} is not smaller than the dense matrix")
    except OptionError as error:
        raise type(error)(f"{target.name}: {error}") from error
    extra = len(target.alike) * target.shape[0] if layer.bias else 0
    after = target.cost(network, weight.element_size(), extra)
    return replace(layer, kind=target.kind, before=before, after=after)


def options_for(target: Target, structure: Format[Any], limits: Limits) -> dict[str, Any]:
    """Return the options of a format that apply to a target."""
    fields = {item.name for item in dataclasses.fields(structure.spec)}
    options = {**limits.options, **target.fixed}
    return {name: value for name, value in options.items() if name in fields}


def _specs(
    target: Target,
    weight: Tensor,
    metric: Metric,
    structure: Format[Any],
    limits: Limits,
    extra: int,
) -> Sequence[Any]:
    budget = _budget(target, limits, extra)
    options = options_for(target, structure, limits)
    if limits.tolerance is None:
        return structure.candidates(target.shape, options, budget)
    found = structure.within(weight, metric, options, limits.tolerance)
    return [spec for spec in found if structure.allows(target.shape, spec, budget)]


def _budget(target: Target, limits: Limits, extra: int) -> Ceiling:
    keep = 1.0 if limits.tolerance is not None else limits.keep
    return target.budget(keep, limits.max_macs, unit=limits.unit, extra=extra)


def _why_dense(
    target: Target,
    weight: Tensor,
    metric: Metric,
    structure: Format[Any],
    limits: Limits,
    extra: int,
) -> str:
    lifted = replace(limits, max_macs=math.inf)
    if _specs(target, weight, metric, structure, lifted, extra):
        return f"needs more than max_macs={limits.max_macs:g} times the dense multiply-adds"
    if limits.tolerance is not None:
        return f"not smaller than dense at tolerance={limits.tolerance:g}"
    return f"no {structure.name} of at most {_budget(target, limits, extra).params} parameters"


class Uniform(Allocation):
    """Every matrix keeps the same fraction of its parameters, or meets the same tolerance."""

    name = "uniform"
    title = "the same fraction of every matrix"
    units = ("params", "macs")
    tolerates = True

    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Give every target the format and spec with the least error within its own share.

        A joint target replaces its matrices.
        """
        replaced = problem.replaced
        targets = [target for target in problem.targets if target.name not in replaced]
        found = replace(problem, targets=targets).map(partial(self._best, problem))
        decided = {target.name: layer for target, layer in found}
        order = [replaced.get(target.name, target).name for target in problem.targets]
        return [decided[name] for name in dict.fromkeys(order)]

    def _best(self, problem: Problem, target: Target, weight: Tensor, metric: Metric) -> LayerPlan:
        formats = [f for f in problem.formats if target.kinds & f.kinds]
        predict = problem.predict or len(formats) > 1
        found = [
            decide(
                target,
                weight,
                metric,
                structure,
                problem.limits,
                predict=predict,
                extra=problem.extra(target),
            )
            for structure in formats
        ]
        if not found:
            return stay_dense(target, weight, f"no format here replaces a {target.kind}")
        smaller = [layer for layer in found if layer.format is not None] or found[:1]
        return smaller[least([layer.error or 0.0 for layer in smaller], EXACT)]


ALLOCATION = Uniform()
