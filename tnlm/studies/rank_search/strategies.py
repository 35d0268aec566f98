"""The two ways to choose ranks by trial: within a tolerance, or to meet a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.metrics.metric import Metric
from tnlm.studies.journal import Journal
from tnlm.studies.mounted import Mounted
from tnlm.studies.rank_search.budget import Choice, choose
from tnlm.studies.rank_search.ranks import MatrixRanks, RankFit, RankFits
from tnlm.studies.rank_search.scorers import Scorer
from tnlm.targets.base import Target

LOSS = "damage"
"""What a journal calls the loss of a trial."""


@dataclass(frozen=True)
class RankTrial:
    """One rank of one matrix, tried on the model.

    Attributes:
        layer: the matrix.
        rank: the rank.
        loss: the measurement: a mean loss, or a score with its sign changed.
        limit: the largest loss that was allowed; None where a budget decides.
        accepted: whether the loss was within the limit; where a budget decides, whether the matrix
            has this rank in the end.
        chunk: the chunk of the items that was measured on, from 1; 0 for all items.
    """

    layer: str
    rank: int
    loss: float
    limit: float | None
    accepted: bool
    chunk: int = 0


@dataclass(frozen=True)
class Subset:
    """Items to measure on.

    Attributes:
        items: the search split, or one of its chunks.
        dense: loss of the dense model on them.
        chunk: which chunk they are, from 1; 0 for all items.
    """

    items: Sequence[Any]
    dense: float
    chunk: int = 0


@dataclass
class RankSearch:
    """Tries ranks on a model.

    Attributes:
        model: the model.
        mounted: mounts matrices on it.
        metric: returns the metric in which a matrix is fitted.
        matrices: in the order in which they are tried.
        scorer: measures the model.
        journal: keeps every measurement.
        progress: whether to show a progress bar.
        trials: the ranks tried so far.
        chosen: the matrices that are mounted, by name.
    """

    model: PreTrainedModel
    mounted: Mounted
    metric: Callable[[Target], Metric]
    matrices: Sequence[MatrixRanks]
    scorer: Scorer
    journal: Journal
    progress: bool
    trials: list[RankTrial] = field(default_factory=list)
    chosen: dict[str, RankFit] = field(default_factory=dict)

    def to_tolerance(self, whole: Subset, chunks: Sequence[Subset] = ()) -> None:
        """Give each matrix in turn the smallest rank whose loss is within the limit.

        With chunks, only one rank is tried on all items: the largest of those that were found
        chunk by chunk.

        Args:
            whole: all items.
            chunks: the items cut into parts, or nothing.
        """
        for tried, matrix in enumerate(self._bar(), start=1):
            fitted, ranks = _Fitted(self, matrix), matrix.ranks
            if chunks:
                ranks = _largest([self._first(fitted, ranks, chunk, tried) for chunk in chunks])
            rank = self._first(fitted, ranks, whole, tried)
            if rank is None:
                self._drop(fitted.name)
            else:
                fitted.put(rank)

    def _first(
        self, fitted: _Fitted, ranks: Sequence[int], subset: Subset, tried: int
    ) -> int | None:
        """Return the first rank whose loss on a subset is within the limit, if there is one."""
        limit = self.scorer.limit(subset.dense, tried)
        for rank in ranks:
            loss = fitted.loss(rank, subset)
            accepted = loss <= limit
            self.trials.append(RankTrial(fitted.name, rank, loss, limit, accepted, subset.chunk))
            if accepted:
                return rank
        return None

    def to_budget(self, whole: Subset, wanted: int) -> None:
        """Try every rank of each matrix alone, then choose those that meet the budget.

        Args:
            whole: all items.
            wanted: how many parameters the model must save.

        Raises:
            BudgetError: if the candidates cannot save that many.
        """
        every = [_Fitted(self, matrix) for matrix in self.matrices]
        choose({fitted.name: fitted.choices() for fitted in every}, wanted)  # raises before work
        found: dict[str, list[Choice]] = {}
        for matrix in self._bar():
            fitted = _Fitted(self, matrix)
            increases = {rank: fitted.loss(rank, whole) - whole.dense for rank in matrix.ranks}
            self._drop(fitted.name)
            found[fitted.name] = fitted.choices(increases)
        chosen = choose(found, wanted)
        for fitted in every:
            if fitted.name in chosen:
                fitted.put(chosen[fitted.name].rank)
        for name, choices in found.items():
            for choice in choices:
                loss, accepted = whole.dense + choice.increase, chosen.get(name) == choice
                self.trials.append(RankTrial(name, choice.rank, loss, None, accepted))

    def _drop(self, name: str) -> None:
        self.chosen.pop(name, None)
        self.mounted.drop(name)

    def _bar(self) -> Any:
        return tqdm(self.matrices, desc="searching", unit="matrix", disable=not self.progress)


def _largest(ranks: Sequence[int | None]) -> Sequence[int]:
    """Return the largest rank, or nothing if one is missing."""
    known = [rank for rank in ranks if rank is not None]
    return [max(known)] if len(known) == len(ranks) else []


class _Fitted:
    """One matrix of a search, fitted when that is first needed: never if the journal knows all."""

    def __init__(self, search: RankSearch, matrix: MatrixRanks) -> None:
        self._search, self._matrix = search, matrix
        self._fits: RankFits | None = None

    @property
    def name(self) -> str:
        return self._matrix.target.name

    def choices(self, increases: dict[int, float] | None = None) -> list[Choice]:
        known = increases or {}
        matrix = self._matrix
        return [Choice(rank, matrix.saved(rank), known.get(rank, 0.0)) for rank in matrix.ranks]

    def loss(self, rank: int, subset: Subset) -> float:
        """Measure the model with the matrix at a rank."""
        search = self._search
        key = f"{self.name} {rank}" + (f" chunk {subset.chunk}" if subset.chunk else "")
        known = search.journal.rows.get(key)
        if known is not None:
            return float(known[LOSS])
        self.put(rank)
        loss = search.scorer.measure(search.model, subset.items).loss
        search.journal.add(key, {LOSS: loss})
        return loss

    def put(self, rank: int) -> None:
        """Mount the matrix at a rank."""
        search, target = self._search, self._matrix.target
        if self._fits is None:
            search.mounted.bare(target.name)
            weight, bias = target.weight(search.model), target.bias(search.model)
            self._fits = RankFits(self._matrix, weight, bias, search.metric(target))
        fitted = search.chosen[target.name] = self._fits.at(rank)
        search.mounted.put({target.name: fitted.fit.pieces[0][2]})
