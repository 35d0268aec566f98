"""Trains and scores subspaces, and finds the smallest one that is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnlm.calibration.data import Batch, fingerprint
from tnlm.recovery.examples import Examples, batches
from tnlm.studies.analysis.goals import Goal
from tnlm.studies.analysis.subspace import FullSpace, Space, Subspace
from tnlm.studies.analysis.training import TrainingConfig, train
from tnlm.studies.journal import Journal
from tnlm.studies.scores import Score, measure, name_of
from tnlm.utils.hashing import model_hash

PRECISION = 1.1
"""The search ends when the smallest d that is enough is at most this many times one that is not."""
FIRST = 8
"""Dimension of the first subspace that is tried, without scales."""


@dataclass(frozen=True)
class SubspaceRun:
    """One subspace that was trained.

    Attributes:
        d: how many parameters were trained, including scales.
        seed: seed of the subspace and of the training.
        score: the best score over the learning rates.
    """

    d: int
    seed: int
    score: float


@dataclass
class SubspaceSearch:
    """Trains and scores subspaces of a model.

    Attributes:
        model: left unchanged.
        kind: kind of the subspaces.
        projection: projection of the subspaces.
        measured: which score is measured.
        examples: the training examples.
        tests: the batches that are scored.
        configs: one training per learning rate, of which the best score counts.
        done: called after every training.
        journal: keeps every score.
        runs: the subspaces scored so far.
    """

    model: Any
    kind: str
    projection: str
    measured: Score
    examples: Examples
    tests: Sequence[Batch]
    configs: Sequence[TrainingConfig]
    done: Callable[[], object]
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    runs: list[SubspaceRun] = field(default_factory=list)

    def open(self, file: Path, start: float) -> None:
        """Keep all scores in a file, and read those that are in it.

        Raises:
            CheckpointError: if the file holds scores of another search.
        """
        about = self._about()
        if callable(self.measured):  # whose name alone says little
            about["before"] = float(f"{start:.3g}")
        self.journal = Journal(file, about)

    def _about(self) -> dict[str, Any]:
        """Return what the scores depend on besides d and the seed, as plain values."""
        size, pad = self.configs[0].batch_size, self.configs[0].pad
        return {
            "model": model_hash(self.model),
            "frozen": [n for n, p in self.model.named_parameters() if not p.requires_grad],
            "data": fingerprint(batches(self.examples, size, pad)),
            "held_out": fingerprint(self.tests),
            "kind": self.kind,
            "projection": self.projection,
            "metric": name_of(self.measured),
            "steps": self.configs[0].steps,
            "learning_rate": [config.learning_rate for config in self.configs],
            "batch_size": size,
        }

    def score(self, d: int | None, seed: int) -> float:
        """Return the score of a subspace, or of all parameters if d is None; train if not known.

        Every score is written to the journal at once; subspaces are also added to ``runs``.
        """
        key = f"d={'all' if d is None else d}, seed={seed}"
        if key not in self.journal.rows:
            self.journal.add(key, {"score": self._train(d, seed)})
        score: float = self.journal.rows[key]["score"]
        if d is not None:
            self.runs.append(SubspaceRun(d, seed, score))
        return score

    def bracket(
        self, goal: Goal, seed: int, dims: Sequence[int] | None, least: int, most: int
    ) -> tuple[int, int | None]:
        """Return the largest d found too small and the smallest found enough; None if none is."""

        def enough(d: int) -> bool:
            return goal.met(self.score(d, seed))

        found = bisect(enough, least, most) if dims is None else try_all(enough, dims, least)
        return (most if dims is None else max(dims), None) if found is None else found

    def _train(self, d: int | None, seed: int) -> float:
        """Train a space once per learning rate; return the best score."""
        scores = []
        for config in self.configs:
            space: Space = FullSpace(self.model)
            if d is not None:
                space = Subspace(
                    self.model, d, seed=seed, kind=self.kind, projection=self.projection
                )
            train(space, self.examples, config, seed)
            with space.applied() as model:
                scores.append(measure(model, self.measured, self.tests))
            self.done()
        return min(scores) if self.measured == "loss" else max(scores)


def try_all(
    enough: Callable[[int], bool], dims: Sequence[int], least: int
) -> tuple[int, int] | None:
    """Try all dims; return the smallest that is enough, preceded by the largest below it.

    Example:
        >>> try_all(lambda d: d >= 7, [2, 5, 10, 20], least=1)
        (5, 10)
    """
    tried = sorted(dims)
    met = [d for d in tried if enough(d)]
    if not met:
        return None
    return max((d for d in tried if d < met[0]), default=least - 1), met[0]


def bisect(enough: Callable[[int], bool], least: int, most: int) -> tuple[int, int] | None:
    """Double d until it is enough, then bisect on a logarithmic scale until the gap is small.

    Args:
        enough: returns whether a d is enough; if it is, all larger ones are assumed to be.
        least: the smallest d that is possible.
        most: the largest d that is possible.

    Returns:
        The largest d found too small and the smallest found enough; None if ``most`` is too small.

    Example:
        >>> bisect(lambda d: d >= 100, least=1, most=1000)
        (99, 108)
    """
    low, high = least - 1, min(least - 1 + FIRST, most)
    while not enough(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high > max(PRECISION * low, low + 1):
        middle = min(max(round(math.sqrt(max(low, 1) * high)), low + 1), high - 1)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low, high
