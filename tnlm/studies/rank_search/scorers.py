"""What a search measures on a model, as a damage that must stay below a limit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.number import finite
from tnlm.recovery.examples import Example, batches
from tnlm.studies.scores import measure

TaskMetric = Callable[[Any, Sequence[Any]], "float | Sequence[float]"]
"""Takes a model and items; returns its score, or that of every item. Higher is better."""

GROWTH = 1.005
"""Factor by which the perplexity may grow with every matrix that is tried, as published."""


@dataclass(frozen=True)
class Measured:
    """A measurement on one split.

    Attributes:
        value: what users read: a perplexity, or a score.
        damage: the same, so that less is better and differences mean the same everywhere.
        items: the score of every item, if there is one.
    """

    value: float
    damage: float
    items: tuple[float, ...] | None = None


class Judge(ABC):
    """Measures models on items, and says how much worse a compressed one may be.

    Attributes:
        name: of the metric.
        slack: how much the damage may grow, in all.
        slope: how much it may grow with every matrix tried.
    """

    name: str
    slack: float = 0.0
    slope: float = 0.0

    @abstractmethod
    def measure(self, model: PreTrainedModel, items: Sequence[Any]) -> Measured:
        """Measure a model, left as it is."""

    def limit(self, dense: float, tried: int) -> float:
        """Return the greatest damage allowed once so many matrices were tried."""
        return dense + self.slack + tried * self.slope


class PerplexityJudge(Judge):
    """Perplexity of windows of tokens, which may grow by a factor with every matrix tried.

    Source: SFSD, Chavan et al. 2024, arXiv 2405.13039; its code allows 1.005 to the power of the
        number of matrices tried.
    """

    name = "perplexity"

    def __init__(self, growth: float | None, pad: int) -> None:
        """Check the growth; ``pad`` fills shorter windows."""
        factor = GROWTH if growth is None else growth
        if not isinstance(factor, int | float) or not 1 <= factor < math.inf:
            raise OptionError(f"growth={factor!r}; allowed: a finite factor of at least 1")
        self.slope, self._pad = math.log(factor), pad

    def measure(self, model: PreTrainedModel, items: Sequence[Example]) -> Measured:
        """Return the perplexity; the damage is its logarithm."""
        held = batches(items, 1, self._pad)  # type: ignore[arg-type]
        loss = measure(model, "loss", held)
        if loss > 700:
            raise EvaluationError(f"the mean loss is {loss:.0f}: its perplexity is not a float")
        return Measured(math.exp(loss), loss)


class TaskJudge(Judge):
    """A score that a callable gives, which may fall by ``delta``."""

    def __init__(self, metric: TaskMetric, delta: float | None) -> None:
        """Check the allowance."""
        self.slack = 0.0 if delta is None else delta
        if not isinstance(self.slack, int | float) or not 0 <= self.slack < math.inf:
            raise OptionError(f"delta={delta!r}; allowed: a finite number of at least 0")
        self._metric = metric
        self.name = getattr(metric, "__name__", type(metric).__name__)

    def measure(self, model: PreTrainedModel, items: Sequence[Any]) -> Measured:
        """Return the mean score; the damage is its negative.

        Raises:
            EvaluationError: if it is not finite, or there is not one for each item.
        """
        with evaluating(model):
            found: Any = self._metric(model, items)
        # A tensor or array of one number has a length of none.
        if not hasattr(found, "__iter__") or getattr(found, "ndim", None) == 0:
            value = finite(found, self.name)
            return Measured(value, -value)
        scores = tuple(finite(s, f"{self.name} of item {i}") for i, s in enumerate(found))
        if len(scores) != len(items):
            raise EvaluationError(
                f"{self.name} gave {len(scores)} scores for {len(items)} items; give one for "
                "each, or one number"
            )
        value = math.fsum(scores) / len(scores)
        return Measured(value, -value, scores)
