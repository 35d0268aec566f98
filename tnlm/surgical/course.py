"""The two ways through a model: to a tolerance, matrix after matrix, or to a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from tnlm.calibration.metrics import Metric
from tnlm.journal import Journal
from tnlm.surgical.budget import Choice, choose
from tnlm.surgical.judges import Judge
from tnlm.surgical.ladder import Ladder, Site
from tnlm.surgical.patient import Patient
from tnlm.targets import Target


@dataclass(frozen=True)
class Trial:
    """One rank of one matrix, tried on the model.

    Attributes:
        layer: the matrix.
        rank: the rank.
        damage: what was measured: a mean loss, or a score with its sign changed.
        limit: the most that was allowed; None where a budget decides.
        accepted: whether the matrix has this rank in the end.
    """

    layer: str
    rank: int
    damage: float
    limit: float | None
    accepted: bool


@dataclass
class Course:
    """A search on a model.

    Attributes:
        patient: what ranks are tried on.
        metric: how the error of a matrix is measured when it is fitted.
        sites: the matrices, in the order in which they are tried.
        judge: measures the model.
        items: what is measured on.
        journal: keeps what was measured.
        progress: whether to show a bar.
        trials: what was tried.
    """

    patient: Patient
    metric: Callable[[Target], Metric]
    sites: Sequence[Site]
    judge: Judge
    items: Sequence[Any]
    journal: Journal
    progress: bool
    trials: list[Trial] = field(default_factory=list)

    def to_tolerance(self, dense: float) -> None:
        """Give every matrix in turn the smallest rank that keeps the damage within its limit.

        Args:
            dense: damage of the dense model.
        """
        for tried, site in enumerate(self._bar(), start=1):
            limit, place = self.judge.limit(dense, tried), _Place(self, site)
            for rank in site.ranks:
                damage = place.damage(rank)
                accepted = damage <= limit
                self.trials.append(Trial(site.target.name, rank, damage, limit, accepted))
                if accepted:
                    place.put(rank)
                    break
            else:
                self.patient.drop(site.target)

    def to_budget(self, dense: float, wanted: int) -> None:
        """Try all ranks of every matrix by itself, and take those of least damage for their size.

        Args:
            dense: damage of the dense model.
            wanted: how many numbers fewer the model is to have.

        Raises:
            BudgetError: if the candidates cannot save so many.
        """
        places = [_Place(self, site) for site in self.sites]
        choose({p.name: p.choices() for p in places}, wanted)  # impossible: said before any work
        found: dict[str, list[Choice]] = {}
        for site in self._bar():
            place = _Place(self, site)
            damages = {rank: place.damage(rank) - dense for rank in site.ranks}
            self.patient.drop(site.target)
            found[place.name] = place.choices(damages)
        chosen = choose(found, wanted)
        for place in places:
            if place.name in chosen:
                place.put(chosen[place.name].rank)
        self.trials += [
            Trial(name, choice.rank, dense + choice.damage, None, chosen.get(name) == choice)
            for name, choices in found.items()
            for choice in choices
        ]

    def _bar(self) -> Any:
        return tqdm(self.sites, desc="searching", unit="matrix", disable=not self.progress)


class _Place:
    """A matrix in the model; fitted when first needed, not where the journal knows all."""

    def __init__(self, course: Course, site: Site) -> None:
        self._course, self._site = course, site
        self._ladder: Ladder | None = None

    @property
    def name(self) -> str:
        return self._site.target.name

    def choices(self, damages: dict[int, float] | None = None) -> list[Choice]:
        known = damages or {}
        return [Choice(r, self._site.saved(r), known.get(r, 0.0)) for r in self._site.ranks]

    def damage(self, rank: int) -> float:
        """Measure the model with the matrix at a rank."""
        course = self._course
        known = course.journal.rows.get(f"{self.name} {rank}")
        if known is not None:
            return float(known["damage"])
        self.put(rank)
        damage = course.judge.measure(course.patient.model, course.items).damage
        course.journal.add(f"{self.name} {rank}", {"damage": damage})
        return damage

    def put(self, rank: int) -> None:
        """Put the matrix at a rank into the model."""
        patient, target = self._course.patient, self._site.target
        if self._ladder is None:
            patient.bare(target.module)
            weight, bias = target.weight(patient.model), target.bias(patient.model)
            self._ladder = Ladder(self._site, weight, bias, self._course.metric(target))
        patient.put(target, self._ladder.rung(rank))
