"""The score at which a training in a subspace counts as good as a full one."""

from __future__ import annotations

from dataclasses import dataclass

from tnlm.errors import EvaluationError
from tnlm.studies.scores import Score


@dataclass(frozen=True)
class Goal:
    """The score that is good enough.

    Attributes:
        target: the score.
        falls: whether lower scores are better.
    """

    target: float
    falls: bool

    def met(self, score: float) -> bool:
        """Return whether a score is good enough."""
        return score <= self.target if self.falls else score >= self.target


def goal_of(score: Score, start: float, full: float, threshold: float) -> Goal:
    """Return the goal: a fraction of what training all parameters achieves.

    An accuracy, or a callable's score, must reach ``threshold`` times that of the full training, as
    published. A loss has no natural zero: it must fall by ``threshold`` times as much as in the
    full training.

    Args:
        score: what is measured.
        start: value before training.
        full: value after training all parameters.
        threshold: the fraction, e.g. 0.9.

    Raises:
        EvaluationError: if the full training improves nothing, or the model meets the goal already.

    Example:
        >>> goal_of("loss", 4.0, 2.0, 0.75), goal_of("accuracy", 0.5, 0.9, 0.9).target
        (Goal(target=2.5, falls=True), 0.81)
    """
    falls = score == "loss"
    if full == start or (full > start) is falls:
        raise EvaluationError(
            f"training all parameters takes the score from {start:.6g} to {full:.6g}, which is no "
            "improvement to compare a subspace with; use more steps, another learning_rate, or "
            "another score"
        )
    if not falls and full <= 0:
        raise EvaluationError(
            f"the full training scores {full:.6g}; a fraction of that is only meaningful above 0"
        )
    goal = Goal(start + threshold * (full - start) if falls else threshold * full, falls)
    if goal.met(start):
        raise EvaluationError(
            f"the score is {start:.6g} without any training, and {goal.target:.6g} is enough "
            f"({threshold:g} of the full training's {full:.6g}); use a higher threshold="
        )
    return goal
