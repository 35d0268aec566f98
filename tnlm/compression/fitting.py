"""Fits the targets of a plan, and holds the results apart from the model until all are done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tnlm.allocation import get_allocation
from tnlm.allocation.uniform import stay_dense
from tnlm.checkpoint.entries import Entry
from tnlm.compression.cascade import Output
from tnlm.compression.job import Job
from tnlm.compression.moments import Moved
from tnlm.compression.parcel import Parcel, fit_as_planned, parcel
from tnlm.layers.swap import Shelf
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan, Plan
from tnlm.targets.base import Fitted, Member, Target
from tnlm.targets.effort import size_of
from tnlm.utils.residency import resident


class Fitting:
    """Fits targets one by one, and holds the results until they are installed.

    Attributes:
        units: the targets to fit, in order.
        errors: measured relative errors, by name in the plan.
        entries: the checkpoint entry of each fitted matrix, by name.
        norms: tuned norms, by name.
        ties: parameters to tie: each name with the name it shares.
    """

    def __init__(self, model: PreTrainedModel, job: Job, decided: Plan, shelf: Shelf) -> None:
        """Start with nothing fitted."""
        self._model, self._job, self._shelf = model, job, shelf
        layers = {layer.name: layer for layer in decided.layers}
        allocation = get_allocation(decided.request.get("allocation", "uniform"))
        self._knew_effects = allocation.weighs_loss
        self._squares: dict[str, list[float]] = {}
        self.errors: dict[str, float] = {}
        self.entries: dict[str, Entry] = {}
        self.norms: dict[str, nn.Module] = {}
        self.ties: dict[str, str] = {}
        self._taken: dict[str, nn.Module] = {}
        known = {unit.name: unit for unit in (*job.units, *job.joint)}
        self.units = [known[layer.name] for layer in decided.layers]
        alone = {one.name: layers[unit.name] for unit in self.units for one in unit.alike}
        self._layers = alone | layers
        self._shrinks = {
            member.name
            for unit in self.units
            if self._layers[unit.name].replaced
            for member in unit.members
        }
        # A fused module is replaced whole, so its dense parts are kept beside the fitted ones.
        replaced = {
            target.name: target
            for group in by_module(job.selection.targets)
            if any(self.shrinks(target) for target in group)
            for target in group
        }
        self._replaced = frozenset(replaced)
        decided_on = {member.name for unit in self.units for member in unit.members}
        self._beside = [target for name, target in replaced.items() if name not in decided_on]

    @property
    def reported(self) -> dict[str, float | None]:
        """The errors for the report, by name in the plan.

        Where errors of several matrices add up by their effects on the loss, and only the plan knew
        these, its own error stays; there is none if few bits come on top.
        """
        if self._job.evidence.weighs_loss or not self._knew_effects:
            return {**self.errors}
        planned = {unit.name: self._layers[unit.name] for unit in self.units if unit.adds_up}
        kept = {name: None if la.precision else la.error for name, la in planned.items()}
        return {**self.errors, **kept}

    def shrinks(self, target: Target) -> bool:
        """Return whether the plan gives a target a format."""
        return target.name in self._shrinks

    def fit(self, unit: Target, moved: Moved | None = None) -> Output | None:
        """Fit one target, to the dense model's statistics or to moved ones."""
        fitted = self.fits(unit, moved)
        replaced = moved is not None and self._layers[unit.name].replaced
        dense = _dense(fitted[0].pieces[0][2]) if replaced else None
        self.put(unit, fitted)
        return dense

    def fits(self, unit: Target, moved: Moved | None = None) -> list[Fitted]:
        """Return the fit of one target, or of each of its parts that stay dense beside others."""
        layer, measure = self._layers[unit.name], self._job.evidence.metric
        with resident(self._model, *(member.module for member in unit.members)):
            if moved is None or not layer.replaced:
                ready = self._job.ready.get(unit.name)
                return [
                    fit_as_planned(self._model, each, layer, measure, ready=ready)
                    for each in self._fitted(unit)
                ]
            newer = partial(measure, newer=moved.statistics)
            about = moved.weight, moved.output
            return [fit_as_planned(self._model, unit, layer, newer, *about)]

    def parcel(self, unit: Target) -> Parcel:
        """Return what :meth:`fits` does for a target, as a call that another process can make."""
        with resident(self._model, *(member.module for member in unit.members)):
            layer, measure = self._layers[unit.name], self._job.evidence.metric
            return parcel(self._model, self._fitted(unit), layer, measure)

    def _fitted(self, unit: Target) -> tuple[Target, ...]:
        """Return what is fitted: a target, or parts of it that stay dense beside fitted ones."""
        if self._layers[unit.name].replaced:
            return (unit,)
        return tuple(member for member in unit.members if member.name in self._replaced)

    def put(self, unit: Target, found: Sequence[Fitted]) -> None:
        """Keep the fits of a target."""
        for fitted in found:
            self._put(self._layers[unit.name], fitted)

    def fit_all(self, units: Sequence[Target], title: str | None) -> Iterator[Target]:
        """Fit targets that do not depend on each other, and yield each once its fit is kept."""
        found = self._job.workers.map(self.fits, units, size_of, portable=self.parcel, title=title)
        for unit, fitted in zip(units, found, strict=True):
            self.put(unit, fitted)
            yield unit

    def fit_beside(self, within: str = "") -> None:
        """Keep the parts of replaced modules that the plan does not name as they are.

        Args:
            within: how the names of the modules begin.
        """
        for target in self._beside:
            if target.name in self.entries or not target.module.startswith(within):
                continue
            with resident(self._model, target.module):
                layer = stay_dense(target, target.weight(self._model), "not chosen")
                self._put(layer, target.fit(self._model, layer, Metric()))
            del self.errors[layer.name]

    def is_due(self, unit: Target) -> bool:
        """Return whether a target, or a part of it that is fitted, is still to be fitted."""
        parts = (member for part in self._fitted(unit) for member in part.members)
        return any(member.name not in self.entries for member in parts)

    def awaits(self, within: str) -> bool:
        """Return whether a target is still to be fitted whose module's name begins so."""
        due = (m for unit in self.units for m in unit.members if m.name in self._replaced)
        return any(m.module.startswith(within) and m.name not in self.entries for m in due)

    def _put(self, layer: LayerPlan, fitted: Fitted) -> None:
        squares = self._squares.setdefault(layer.name, [])
        squares.append(fitted.error**2)
        self.errors[layer.name] = math.sqrt(sum(squares) / len(squares))
        self.ties.update(fitted.ties)
        for target, entry, module in fitted.pieces:
            self.entries[target.name] = entry
            self._shelf.put(target.name, module)

    def restore(
        self, entries: Mapping[str, Entry], errors: Mapping[str, float], ties: Mapping[str, str]
    ) -> None:
        """Take over the results of an earlier run, whose modules are written already."""
        self.entries.update(entries)
        self.errors.update(errors)
        self.ties.update(ties)

    def take(self, block: str) -> dict[str, nn.Module]:
        """Fit what is left of a block, and take its modules off the shelf, by module name."""
        self._finish(block + ".")
        self._taken = {}
        found, tied = {}, {*self.ties, *self.ties.values()}
        for group in by_module(self._job.selection.targets):
            module = group[0].module
            if module.startswith(block + ".") and group[0].name in self.entries:
                parts = {target.name: self._shelf.take(target.name) for target in group}
                for target in group:
                    for name, parameter in parts[target.name].named_parameters():
                        if f"{target.path}.{name}" in tied:  # with blocks not tuned now
                            parameter.requires_grad_(False)
                self._taken.update(parts)
                found[module] = group[0].assemble(group, parts)
        return found

    def _finish(self, within: str) -> None:
        """Fit what is left in modules whose names begin so, such as parts that stay dense."""
        for unit in self.units:
            inside = all(member.module.startswith(within) for member in unit.members)
            if inside and self.is_due(unit):
                self.fit(unit)
        self.fit_beside(within)

    def keep(self, block: str, tuned: Mapping[str, nn.Module]) -> None:
        """Put tuned modules back on the shelf, and hold tuned norms in memory."""
        modules = {target.module for target in self._job.selection.targets}
        for name, module in self._taken.items():
            self._shelf.put(name, module)
        self.norms.update({name: m for name, m in tuned.items() if name not in modules})


def by_module(targets: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Yield all that each of the targets' modules holds, chosen or not, in order."""
    yield from dict.fromkeys(target.siblings for target in targets)


def _dense(module: Any) -> Output:
    return Output(module.weight.detach(), module.bias)
