"""Subspaces that are trained and scored, and the search for the smallest that is enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tnlm.analysis.runs import Course, train
from tnlm.analysis.scores import Goal, Metric, measure
from tnlm.analysis.subspace import Space, Subspace
from tnlm.calibration.data import Batch
from tnlm.errors import EvaluationError
from tnlm.recovery.examples import Examples

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
    """Trains spaces beside a model, one after another, and keeps the scores.

    Attributes:
        model: left as it is.
        kind: of the subspaces.
        projection: of the subspaces.
        metric: what the scores are.
        examples: what is trained on.
        tests: what is scored on.
        courses: one for each learning rate; the best score counts.
        done: called after every training.
        runs: the subspaces trained so far.
    """

    model: Any
    kind: str
    projection: str
    metric: Metric
    examples: Examples
    tests: Sequence[Batch]
    courses: Sequence[Course]
    done: Callable[[], object]
    runs: list[Run] = field(default_factory=list)

    def score(self, make: Callable[[], Space], seed: int) -> float:
        """Return the best score of a space, trained anew at every learning rate."""
        scores = []
        for course in self.courses:
            space = make()
            train(space, self.examples, course, seed)
            with space.applied() as model:
                scores.append(measure(model, self.metric, self.tests))
            self.done()
        return min(scores) if self.metric == "loss" else max(scores)

    def subspace(self, d: int, seed: int) -> float:
        """Train a subspace, and return and keep its score."""

        def make() -> Subspace:
            return Subspace(self.model, d, seed=seed, kind=self.kind, projection=self.projection)

        self.runs.append(Run(d, seed, self.score(make, seed)))
        return self.runs[-1].score

    def bracket(
        self, goal: Goal, seed: int, dims: Sequence[int] | None, least: int, most: int
    ) -> tuple[int, int]:
        """Return the least d found to be enough, after the greatest below that was not.

        Raises:
            EvaluationError: if none is enough.
        """

        def enough(d: int) -> bool:
            return goal.met(self.subspace(d, seed))

        found = search(enough, least, most) if dims is None else sweep(enough, dims, least)
        if found is None:
            own = [run for run in self.runs if run.seed == seed]
            best = (min if goal.falls else max)(own, key=lambda run: run.score)
            raise EvaluationError(
                f"seed {seed}: no d up to {max(run.d for run in own)} is enough: the best score is "
                f"{best.score:.6g} at d={best.d}, and {goal.target:.6g} is wanted; try larger "
                "dims=, more steps, or other learning rates"
            )
        return found


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
