"""A copy of a model on which states of a search are mounted, and their divergences measured."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from tnlm.allocation.curves import Curve
from tnlm.compression.job import Job
from tnlm.compression.parcel import fit_as_planned
from tnlm.plans.plan import LayerPlan
from tnlm.studies.journal import Journal
from tnlm.studies.level_search.divergence import Divergence
from tnlm.studies.level_search.levels import State
from tnlm.studies.mounted import Mounted

VALUE = "divergence"
"""What a journal calls the value of a trial."""


class Trials:
    """Measures states; what a journal knows is neither fitted nor run again.

    Args:
        model: the dense model, whose weights are fitted.
        copy: a copy of it.
        mounted: mounts matrices on the copy.
        job: the request.
        curves: the candidates of every unit.
        divergence: what is measured.
        journal: keeps every value.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        copy: PreTrainedModel,
        mounted: Mounted,
        job: Job,
        curves: Sequence[Curve],
        divergence: Divergence,
        journal: Journal,
    ) -> None:
        """Start with the dense copy; see the class for the arguments."""
        self._model, self._copy, self._mounted, self._job = model, copy, mounted, job
        self._curves, self._divergence, self._journal = curves, divergence, journal
        self._units = {unit.name: unit for unit in (*job.units, *job.joint)}
        self._now: dict[int, int] = {}
        self._names: dict[int, list[str]] = {}
        self._fits: dict[tuple[int, int], dict[str, nn.Module]] = {}

    def measure(self, state: State, tokens: int, divergence: Divergence | None = None) -> float:
        """Return the divergence of a state on some tokens, by default of the search's windows."""
        measured = divergence or self._divergence
        key = f"{hashlib.sha256(str(state).encode()).hexdigest()[:16]} {tokens}{measured.place}"
        known = self._journal.rows.get(key)
        if known is None:
            self._mount(state)
            known = {VALUE: measured(self._copy, tokens)}
            self._journal.add(key, known)
        return float(known[VALUE])

    def layers(self, state: State) -> list[LayerPlan]:
        """Return the decisions of a state."""
        chosen = zip(self._curves, state, strict=True)
        return [layer for curve, index in chosen for layer in curve[index].layers]

    @property
    def names(self) -> list[str]:
        """Return a name of every unit: the module that holds its matrices alone, or all of them."""
        matrices = [[layer.name for layer in curve[-1].layers] for curve in self._curves]
        holders = [_shared(names) for names in matrices]
        return [
            holder if holder and holders.count(holder) == 1 else "+".join(names)
            for holder, names in zip(holders, matrices, strict=True)
        ]

    def keep(self, state: State) -> None:
        """Forget the fits that a state does not need."""
        needed = set(enumerate(state))
        self._fits = {place: fits for place, fits in self._fits.items() if place in needed}

    def _mount(self, state: State) -> None:
        """Put in the units whose candidates on the copy are not those of a state."""
        for unit, index in enumerate(state):
            if self._now.get(unit) == index:
                continue
            for name in self._names.pop(unit, ()):
                self._mounted.drop(name)
            modules = self._fitted(unit, index)
            self._mounted.put(modules)
            self._now[unit], self._names[unit] = index, list(modules)

    def _fitted(self, unit: int, index: int) -> dict[str, nn.Module]:
        """Return the modules of a unit's candidate, by the names of their matrices."""
        if (unit, index) not in self._fits:
            layers = [each for each in self._curves[unit][index].layers if each.replaced]
            metric = self._job.evidence.metric
            fitted = [
                fit_as_planned(self._model, self._units[layer.name], layer, metric)
                for layer in layers
            ]
            self._fits[unit, index] = {
                target.name: module for fit in fitted for target, _, module in fit.pieces
            }
        return self._fits[unit, index]


def _shared(names: Sequence[str]) -> str:
    """Return the longest dotted name that all names begin with.

    >>> _shared(["h.0.mlp.up", "h.0.mlp.down"])
    'h.0.mlp'
    """
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(each[0] for each in itertools.takewhile(lambda p: len(set(p)) == 1, parts))
