"""Fits what a plan decided, and keeps the results apart from the model until all are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tnlm.checkpoint.entries import Entry
from tnlm.compression.cascade import Fitted
from tnlm.compression.install import assemble, fit_target
from tnlm.compression.job import Job
from tnlm.compression.moments import Moved
from tnlm.decompositions.base import from_dict
from tnlm.decompositions.channels import FORMAT as CHANNELS
from tnlm.decompositions.channels import ChannelsSpec
from tnlm.layers.swap import Shelf
from tnlm.plans.plan import LayerPlan, Plan
from tnlm.targets.base import Target, members_of
from tnlm.targets.channels import FeedForward, sliced
from tnlm.targets.stacks import Stack, ties, unstack
from tnlm.tensors.precision import is_half, rounded


class Fitting:
    """Fits targets one by one, and keeps what is done until it goes into the model.

    Attributes:
        units: what is fitted, in order.
        errors: measured relative errors, by the names in the plan.
        entries: what a checkpoint will say of every fitted matrix, by its name.
        norms: other modules that were tuned, by name.
        ties: parameters that become one, name to the name shared.
    """

    def __init__(self, model: PreTrainedModel, job: Job, decided: Plan, shelf: Shelf) -> None:
        """Start with nothing fitted."""
        self._model, self._job, self._shelf = model, job, shelf
        self._layers = {layer.name: layer for layer in decided.layers}
        self.errors: dict[str, float] = {}
        self.entries: dict[str, Entry] = {}
        self.norms: dict[str, nn.Module] = {}
        self.ties: dict[str, str] = {}
        self._taken: dict[str, nn.Module] = {}
        known = {unit.name: unit for unit in (*job.units, *job.joint)}
        self.units = [known[layer.name] for layer in decided.layers]
        self._shrinks = {
            member.name
            for unit in self.units
            if self._layers[unit.name].format is not None
            for member in members_of(unit)
        }
        # A fused module is replaced whole, so its dense parts are kept beside the fitted ones.
        self._replaced = {
            target.name
            for group in by_module(job.selection.targets)
            if any(self.shrinks(target) for target in group)
            for target in group
        }

    def shrinks(self, target: Target) -> bool:
        """Return whether a target is given a format, and so is fitted."""
        return target.name in self._shrinks

    def fit(self, unit: Target, moved: Moved | None = None) -> Fitted | None:
        """Fit one target or stack, to the dense model's statistics or to moved ones."""
        layer = self._layers[unit.name]
        members = [member for member in members_of(unit) if member.name in self._replaced]
        if not members:
            return None
        if layer.format is None:
            for member in members:
                self._fit_one(member, layer, None)
            return None
        if isinstance(unit, Stack):
            self._fit_stack(unit, layer)
            return None
        if isinstance(unit, FeedForward):
            self._fit_channels(unit, layer)
            return None
        return self._fit_one(unit, layer, moved)

    def _fit_one(self, target: Target, layer: LayerPlan, moved: Moved | None) -> Fitted | None:
        dense, bias = target.weight(self._model), target.bias(self._model)
        weight, output = dense, None
        if moved is not None:
            weight, output = moved.weight.to(dense), moved.output
        metric = self._job.metric(target, moved.statistics if moved else None)
        entry, module, error = self._job.ready.get(target.name) or fit_target(
            target, weight, bias, metric, layer, output
        )
        fitted = None if moved is None else _dense(module)
        self.errors[layer.name] = error
        self._put(target, entry, module)
        return fitted

    def _fit_stack(self, unit: Stack, layer: LayerPlan) -> None:
        weight, metric = unit.weight(self._model), self._job.metric(unit)
        entry, module, self.errors[layer.name] = fit_target(unit, weight, None, metric, layer)
        biases = [member.bias(self._model) for member in unit.members]
        for member, parts in zip(unit.members, unstack(unit, entry, module, biases), strict=True):
            self._put(member, *parts)
        self.ties.update(ties(unit))

    def _fit_channels(self, unit: FeedForward, layer: LayerPlan) -> None:
        weight, metric = unit.weight(self._model), self._job.metric(unit)
        structure, spec = CHANNELS, from_dict(ChannelsSpec, layer.spec)
        with torch.no_grad():
            factors = structure.fit(weight, metric, spec)
            rows = rounded(factors["rows"], weight.dtype, f"the reader's weight in {unit.name}")
            seen = factors | ({"rows": rows.double()} if is_half(weight.dtype) else {})
            rebuilt = structure.reconstruct(unit.shape, spec, seen)
            self.errors[layer.name] = metric.relative(weight, rebuilt)
        for member, entry, module in sliced(unit, self._model, factors):
            self._put(member, entry, module)

    def _put(self, target: Target, entry: Entry, module: nn.Module) -> None:
        self.entries[target.name] = entry
        self._shelf.put(target.name, module)

    def take(self, block: str) -> dict[str, nn.Module]:
        """Return the fitted modules of a block, off the shelf, by module name."""
        self._taken = {}
        found = {}
        for group in by_module(self._job.selection.targets):
            module = group[0].module
            if module.startswith(block + ".") and group[0].name in self.entries:
                parts = {target.name: self._shelf.take(target.name) for target in group}
                for target in group:
                    if self.entries[target.name].get("shared"):  # by blocks tuned one by one
                        parts[target.name].get_submodule("right").requires_grad_(False)
                self._taken.update(parts)
                found[module] = assemble(group, parts)
        return found

    def keep(self, block: str, tuned: Mapping[str, nn.Module]) -> None:
        """Put tuned modules back on the shelf; what else was tuned waits in memory."""
        modules = {target.module for target in self._job.selection.targets}
        for name, module in self._taken.items():
            self._shelf.put(name, module)
        self.norms.update({name: m for name, m in tuned.items() if name not in modules})


def by_module(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield the targets of one module together, in order."""
    for _, group in groupby(targets, key=lambda target: target.module):
        yield list(group)


def _dense(module: Any) -> Fitted:
    return Fitted(module.weight.detach(), module.bias)
