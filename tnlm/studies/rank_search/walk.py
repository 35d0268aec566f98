"""The two ways through a model: to a tolerance, matrix after matrix, or to a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from tnlm.calibration.metrics import Metric
from tnlm.studies.journal import Journal
from tnlm.studies.mounted import Patient
from tnlm.studies.nested_ranks import Ladder, Site
from tnlm.studies.rank_search.budget import Choice, choose
from tnlm.studies.rank_search.scorers import Judge
from tnlm.targets import Target


@dataclass(frozen=True)
class Trial:
    """One rank of one matrix, tried on the model.

    Attributes:
        layer: the matrix.
        rank: the rank.
        damage: what was measured: a mean loss, or a score with its sign changed.
        limit: the most that was allowed; None where a budget decides.
        accepted: whether it was within the limit; of a trial on all items, whether the matrix has
            this rank in the end.
        chunk: the chunk of the items that was measured on, from 1; 0 for all of them.
    """

    layer: str
    rank: int
    damage: float
    limit: float | None
    accepted: bool
    chunk: int = 0


@dataclass(frozen=True)
class Part:
    """Items to measure on.

    Attributes:
        items: of the search split, or of one of its chunks.
        dense: damage of the dense model on them.
        chunk: which chunk they are, from 1; 0 for all items.
    """

    items: Sequence[Any]
    dense: float
    chunk: int = 0


@dataclass
class Course:
    """A search on a model.

    Attributes:
        patient: what ranks are tried on.
        metric: how the error of a matrix is measured when it is fitted.
        sites: the matrices, in the order in which they are tried.
        judge: measures the model.
        journal: keeps what was measured.
        progress: whether to show a bar.
        trials: what was tried.
    """

    patient: Patient
    metric: Callable[[Target], Metric]
    sites: Sequence[Site]
    judge: Judge
    journal: Journal
    progress: bool
    trials: list[Trial] = field(default_factory=list)

    def to_tolerance(self, whole: Part, chunks: Sequence[Part] = ()) -> None:
        """Give every matrix in turn the smallest rank that keeps the damage within its limit.

        With chunks, the only rank that is tried on the whole is the largest of those that are the
        smallest good enough on each.

        Args:
            whole: all items.
            chunks: parts of them; none for no chunks.
        """
        for tried, site in enumerate(self._bar(), start=1):
            place, ranks = _Place(self, site), site.ranks
            if chunks:
                firsts = [self._first(place, ranks, chunk, tried) for chunk in chunks]
                ranks = _largest(firsts)
            rank = self._first(place, ranks, whole, tried)
            if rank is None:
                self.patient.drop(site.target)
            else:
                place.put(rank)

    def _first(self, place: _Place, ranks: Sequence[int], part: Part, tried: int) -> int | None:
        """Return the first rank that is good enough on a part, if any is."""
        limit = self.judge.limit(part.dense, tried)
        for rank in ranks:
            damage = place.damage(rank, part)
            accepted = damage <= limit
            self.trials.append(Trial(place.name, rank, damage, limit, accepted, part.chunk))
            if accepted:
                return rank
        return None

    def to_budget(self, whole: Part, wanted: int) -> None:
        """Try all ranks of every matrix by itself, and take those of least damage for their size.

        Args:
            whole: all items.
            wanted: how many numbers fewer the model is to have.

        Raises:
            BudgetError: if the candidates cannot save so many.
        """
        places = [_Place(self, site) for site in self.sites]
        choose({p.name: p.choices() for p in places}, wanted)  # impossible: said before any work
        found: dict[str, list[Choice]] = {}
        for site in self._bar():
            place = _Place(self, site)
            damages = {rank: place.damage(rank, whole) - whole.dense for rank in site.ranks}
            self.patient.drop(site.target)
            found[place.name] = place.choices(damages)
        chosen = choose(found, wanted)
        for place in places:
            if place.name in chosen:
                place.put(chosen[place.name].rank)
        self.trials += [
            Trial(name, choice.rank, whole.dense + choice.damage, None, chosen.get(name) == choice)
            for name, choices in found.items()
            for choice in choices
        ]

    def _bar(self) -> Any:
        return tqdm(self.sites, desc="searching", unit="matrix", disable=not self.progress)


def _largest(ranks: Sequence[int | None]) -> Sequence[int]:
    """Return the largest rank, or nothing if one is missing."""
    known = [rank for rank in ranks if rank is not None]
    return [max(known)] if len(known) == len(ranks) else []


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

    def damage(self, rank: int, part: Part) -> float:
        """Measure the model with the matrix at a rank."""
        course = self._course
        key = f"{self.name} {rank}" + (f" chunk {part.chunk}" if part.chunk else "")
        known = course.journal.rows.get(key)
        if known is not None:
            return float(known["damage"])
        self.put(rank)
        damage = course.judge.measure(course.patient.model, part.items).damage
        course.journal.add(key, {"damage": damage})
        return damage

    def put(self, rank: int) -> None:
        """Put the matrix at a rank into the model."""
        patient, target = self._course.patient, self._site.target
        if self._ladder is None:
            patient.bare(target.module)
            weight, bias = target.weight(patient.model), target.bias(patient.model)
            self._ladder = Ladder(self._site, weight, bias, self._course.metric(target))
        patient.put(target, self._ladder.rung(rank))
