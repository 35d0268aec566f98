"""One fit with everything it needs, so that it can be made in any process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tnlm.metrics.metric import Metric
from tnlm.metrics.several import Several
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Fitted, Target
from tnlm.targets.rounding import rounded


def fit_as_planned(
    model: nn.Module,
    target: Target,
    layer: LayerPlan,
    metric: Callable[[Target], Metric],
    weight: Tensor | None = None,
    output: Tensor | None = None,
    ready: Fitted | None = None,
) -> Fitted:
    """Fit a target, and store it in as few bits as planned.

    Args:
        model: holds the weights.
        target: what is fitted.
        layer: the decision.
        metric: returns the metric of the target, and of each matrix in it.
        weight: the matrix to approximate, instead of the model's own.
        output: the mean output to match, for a metric with a mean.
        ready: its fit, if it was made already.
    """
    fitted = ready or target.fit(model, layer, metric(target), weight, output)
    if layer.grid is not None and layer.replaced:
        wanted = target.weight(model) if weight is None else weight
        fitted = rounded(fitted, layer.grid, metric, wanted if len(fitted.pieces) == 1 else None)
    return replace(fitted, metrics={})  # of the size of the statistics, and of no further use


@dataclass(frozen=True)
class Parcel:
    """Fits that can be pickled and need nothing else.

    Attributes:
        model: only the modules that hold the weights.
        targets: what is fitted.
        layer: the decision on them.
        metrics: of the targets, and of the matrices in them, by name.
    """

    model: nn.Module
    targets: tuple[Target, ...]
    layer: LayerPlan
    metrics: Mapping[str, Metric]

    def __call__(self) -> list[Fitted]:
        """Make the fits."""
        return [
            fit_as_planned(self.model, each, self.layer, lambda t: self.metrics[t.name])
            for each in self.targets
        ]


def parcel(
    model: nn.Module,
    targets: tuple[Target, ...],
    layer: LayerPlan,
    metric: Callable[[Target], Metric],
) -> Parcel:
    """Return the fits of targets as a parcel; see :class:`Parcel`."""
    members = [member for target in targets for member in target.members]
    measured = [*targets, *(members if layer.grid is not None else ())]
    metrics = {each.name: _whole(metric(each)) for each in measured}
    return Parcel(only(model, (each.module for each in members)), targets, layer, metrics)


def only(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Return copies of some modules under their names, without hooks and without the others.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 4)))
        >>> only(model, ["1.1"])
        Module(
          (1): Module(
            (1): Linear(in_features=3, out_features=4, bias=True)
          )
        )
    """
    found = nn.Module()
    for name in dict.fromkeys(names):
        at = found
        *path, last = name.split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, _copied(model.get_submodule(name)))
    return found


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy whose tensors have memory of their own: a pickled view brings all it views."""
    held = [*module.parameters(), *module.buffers()]
    memo = {
        id(t): nn.Parameter(t.detach().clone(), t.requires_grad)
        if isinstance(t, nn.Parameter)
        else t.clone()
        for t in held
    }
    hooks = [(each, vars(each).copy()) for each in module.modules()]
    try:
        for each, values in hooks:
            vars(each).update({name: type(v)() for name, v in values.items() if "_hooks" in name})
        return copy.deepcopy(module, memo)
    finally:
        for each, values in hooks:
            vars(each).update(values)


class _Held:
    """Returns a value."""

    def __init__(self, value: Metric) -> None:
        self._value = value

    def __call__(self) -> Metric:
        return self._value


def _whole(metric: Metric) -> Metric:
    """Return a metric that refers to nothing outside itself."""
    if isinstance(metric, Several):
        return Several([_Held(part()) for part in metric.parts], metric.scales)
    return metric
