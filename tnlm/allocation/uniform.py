"""Uniform allocation: the same fraction, tolerance or rank for every matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tnlm.allocation.pricing import dense_cost, network_cost
from tnlm.calibration.metrics import Metric
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Budget, Format, from_dict, to_dict
from tnlm.errors import OptionError
from tnlm.planning import LayerPlan
from tnlm.targets import Target


@dataclass(frozen=True)
class Limits:
    """What every matrix may cost, or how large its error may be.

    Attributes:
        keep: fraction of the matrix's parameters.
        tolerance: relative error in the metric; then ``keep`` does not bind.
        max_macs: multiply-adds per token, as a multiple of the dense matrix's.
        options: the format's options that the user or the scheme fixes.
    """

    keep: float
    tolerance: float | None = None
    max_macs: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


def decide(
    target: Target,
    weight: Tensor,
    metric: Metric,
    structure: Format[Any],
    limits: Limits,
    *,
    predict: bool,
) -> LayerPlan:
    """Choose the spec of least error within the limits, or leave the matrix dense and say why.

    Args:
        target: the matrix.
        weight: its ``(out, in)`` values.
        metric: how its error is measured.
        structure: the format that replaces it.
        limits: what it may cost.
        predict: compute the error even when there is nothing to choose.

    Raises:
        RankError: if the options ask for what the matrix cannot have; names the target.
    """
    before = dense_cost(target, weight.element_size())
    try:
        specs = _specs(target, weight, metric, structure, limits)
        if not specs:
            note = _why_dense(target, weight, metric, structure, limits)
            return LayerPlan(
                target.name, target.kind, target.shape, None, {}, before, before, note=note
            )
        errors: Sequence[float | None] = [None]
        if limits.tolerance is not None:
            specs = [min(specs, key=lambda spec: structure.network(target.shape, spec).params)]
        if predict or len(specs) > 1:
            errors = structure.errors(weight, metric, specs)
    except OptionError as error:
        raise type(error)(
            f"{target.name}: {error}; ask for what all targets can have, or name it in ignore="
        ) from error
    scores = [math.inf if error is None else error for error in errors]
    best = min(range(len(specs)), key=scores.__getitem__)
    after = network_cost(
        target, structure.network(target.shape, specs[best]), weight.element_size()
    )
    return LayerPlan(
        target.name,
        target.kind,
        target.shape,
        structure.name,
        to_dict(specs[best]),
        before,
        after,
        errors[best],
    )


def reprice(target: Target, weight: Tensor, layer: LayerPlan) -> LayerPlan:
    """Return a decision made elsewhere with its costs, checked as if it were made here.

    Raises:
        OptionError: if the matrix cannot have the format or spec, or would not shrink.
    """
    before = dense_cost(target, weight.element_size())
    if layer.format is None:
        return replace(layer, kind=target.kind, before=before, after=before)
    try:
        structure = get_format(layer.format)
        if target.kind not in structure.kinds:
            raise OptionError(f"a {structure.name} cannot replace a {target.kind}")
        network = structure.network(target.shape, from_dict(structure.spec, layer.spec))
        if target.kind == "embedding" and network.gauge is not None:
            raise OptionError("gauge=true; allowed for an embedding: false")
        if network.params >= target.params:
            raise OptionError(f"{dict(layer.spec)} is not smaller than the dense matrix")
    except OptionError as error:
        raise type(error)(f"{target.name}: {error}") from error
    after = network_cost(target, network, weight.element_size())
    return replace(layer, kind=target.kind, before=before, after=after)


def _specs(
    target: Target, weight: Tensor, metric: Metric, structure: Format[Any], limits: Limits
) -> Sequence[Any]:
    budget = _budget(target, limits)
    # Rows of a gauge-fixed table could not be looked up: an embedding keeps its factors whole.
    plain = {"gauge": False} if target.kind == "embedding" else {}
    options = {**limits.options, **plain}
    if limits.tolerance is None:
        return structure.candidates(target.shape, options, budget)
    found = structure.within(weight, metric, options, limits.tolerance)
    return [spec for spec in found if budget.allows(structure.network(target.shape, spec))]


def _budget(target: Target, limits: Limits) -> Budget:
    # Strictly fewer parameters than dense: a layer that cannot shrink stays as it is.
    keep = 1.0 if limits.tolerance is not None else limits.keep
    params = min(math.floor(keep * target.params + 1e-9), target.params - 1)
    if target.kind == "embedding":
        return Budget(params)  # a lookup costs little, and rows are priced by the report
    return Budget(params, limits.max_macs * target.params)


def _why_dense(
    target: Target, weight: Tensor, metric: Metric, structure: Format[Any], limits: Limits
) -> str:
    lifted = Limits(limits.keep, limits.tolerance, math.inf, limits.options)
    if target.kind == "linear" and _specs(target, weight, metric, structure, lifted):
        return f"needs more than max_macs={limits.max_macs:g} times the dense multiply-adds"
    if limits.tolerance is not None:
        return f"not smaller than dense at tolerance={limits.tolerance:g}"
    return f"no {structure.name} of at most {_budget(target, limits).params} parameters"
