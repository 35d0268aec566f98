"""Subspaces that are trained and scored, and the search for the smallest that is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tnlm.calibration.data import Batch, fingerprint
from tnlm.calibration.store import model_hash
from tnlm.recovery.examples import Examples, batches
from tnlm.studies.analysis.subspace import FullSpace, Space, Subspace
from tnlm.studies.analysis.training import Course, train
from tnlm.studies.journal import Journal
from tnlm.studies.scores import Goal, Metric, measure, name_of

PRECISION = 1.1
"""A search ends when the d that is enough is at most this many times one that is not."""
FIRST = 8
"""Coordinates of the first subspace that is tried."""


@dataclass(frozen=True)
class Run:
    """One subspace that was trained.

    Attributes:
        d: numbers that were trained, scales included.
        seed: of the subspace and of the training.
        score: the best over the learning rates.
    """

    d: int
    seed: int
    score: float


@dataclass
class Trials:
    """Trains spaces beside a model, one after another; no score is lost.

    Attributes:
        model: left as it is.
        kind: of the subspaces.
        projection: of the subspaces.
        metric: what the scores are.
        examples: what is trained on.
        tests: what is scored on.
        courses: one for each learning rate; the best score counts.
        done: called after every training.
        journal: keeps every score.
        runs: the subspaces scored so far.
    """

    model: Any
    kind: str
    projection: str
    metric: Metric
    examples: Examples
    tests: Sequence[Batch]
    courses: Sequence[Course]
    done: Callable[[], object]
    journal: Journal = field(default_factory=lambda: Journal(None, {}))
    runs: list[Run] = field(default_factory=list)

    def open(self, file: Path, start: float) -> None:
        """Keep all scores in a file, and take those that it holds.

        Raises:
            CheckpointError: if the file holds scores of something else.
        """
        about = self._about()
        if callable(self.metric):  # of which the name alone tells little
            about["before"] = float(f"{start:.3g}")
        self.journal = Journal(file, about)

    def _about(self) -> dict[str, Any]:
        """Return what the scores depend on, beside d and the seed, as plain values."""
        size, pad = self.courses[0].batch_size, self.courses[0].pad
        return {
            "model": model_hash(self.model),
            "frozen": [n for n, p in self.model.named_parameters() if not p.requires_grad],
            "data": fingerprint(batches(self.examples, size, pad)),
            "held_out": fingerprint(self.tests),
            "kind": self.kind,
            "projection": self.projection,
            "metric": name_of(self.metric),
            "steps": self.courses[0].steps,
            "learning_rate": [course.learning_rate for course in self.courses],
            "batch_size": size,
        }

    def score(self, d: int | None, seed: int) -> float:
        """Return the score of a subspace, or of all parameters if d is None; trained if not known.

        What is trained is at once in the journal; subspaces are also kept in ``runs``.
        """
        key = f"d={'all' if d is None else d}, seed={seed}"
        if key not in self.journal.rows:
            self.journal.add(key, {"score": self._train(d, seed)})
        score: float = self.journal.rows[key]["score"]
        if d is not None:
            self.runs.append(Run(d, seed, score))
        return score

    def bracket(
        self, goal: Goal, seed: int, dims: Sequence[int] | None, least: int, most: int
    ) -> tuple[int, int | None]:
        """Return the least d found to be enough, None if none is, after the greatest below it."""

        def enough(d: int) -> bool:
            return goal.met(self.score(d, seed))

        found = search(enough, least, most) if dims is None else sweep(enough, dims, least)
        return (most if dims is None else max(dims), None) if found is None else found

    def _train(self, d: int | None, seed: int) -> float:
        """Return the best score of a space, trained anew at every learning rate."""
        scores = []
        for course in self.courses:
            space: Space = FullSpace(self.model)
            if d is not None:
                space = Subspace(
                    self.model, d, seed=seed, kind=self.kind, projection=self.projection
                )
            train(space, self.examples, course, seed)
            with space.applied() as model:
                scores.append(measure(model, self.metric, self.tests))
            self.done()
        return min(scores) if self.metric == "loss" else max(scores)


def sweep(enough: Callable[[int], bool], dims: Sequence[int], least: int) -> tuple[int, int] | None:
    """Try all dims; return the least that is enough, after the one before it.

    Example:
        >>> sweep(lambda d: d >= 7, [2, 5, 10, 20], least=1)
        (5, 10)
    """
    tried = sorted(dims)
    met = [d for d in tried if enough(d)]
    if not met:
        return None
    return max((d for d in tried if d < met[0]), default=least - 1), met[0]


def search(enough: Callable[[int], bool], least: int, most: int) -> tuple[int, int] | None:
    """Double d until it is enough; then halve the gap, in ratio, until it is small.

    Args:
        enough: whether a d is; taken to be so for all greater ones.
        least: the smallest d that is possible.
        most: the greatest.

    Returns:
        The greatest d found too small, and the least found enough; None if ``most`` is not.

    Example:
        >>> search(lambda d: d >= 100, least=1, most=1000)
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
