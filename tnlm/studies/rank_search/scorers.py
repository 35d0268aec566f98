"""What a rank search measures on a model, as a loss with a limit."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.number import exponential, finite
from tnlm.recovery.examples import Example, batches
from tnlm.studies.scores import measure
from tnlm.utils.checks import is_real

ItemScore = Callable[[Any, Sequence[Any]], "float | Sequence[float]"]
"""Takes a model and items; returns one score, or one for every item. Higher is better."""

GROWTH = 1.005
"""Factor by which the perplexity may grow per matrix tried, as published."""


@dataclass(frozen=True)
class Measured:
    """A measurement on one split.

    Attributes:
        value: what users read: a perplexity, or a score.
        loss: the same on a scale where lower is better and differences add up.
        items: the score of each item, if there is one.
    """

    value: float
    loss: float
    items: tuple[float, ...] | None = None


class Scorer(ABC):
    """Measures a model on items, and says how much its loss may rise.

    Attributes:
        name: of what is measured.
        slack: how much the loss may rise in total.
        slope: how much it may rise per matrix tried.
    """

    name: str
    slack: float = 0.0
    slope: float = 0.0

    @abstractmethod
    def measure(self, model: PreTrainedModel, items: Sequence[Any]) -> Measured:
        """Measure a model, which is left unchanged."""

    def limit(self, dense: float, tried: int) -> float:
        """Return the largest loss allowed after a number of matrices were tried."""
        return dense + self.slack + tried * self.slope


class PerplexityScorer(Scorer):
    """Perplexity on windows of tokens, which may grow by a factor per matrix tried.

    Source: SFSD, Chavan et al. 2024, arXiv 2405.13039; its code allows 1.005 to the power of the
        number of matrices tried.
    """

    name = "perplexity"

    def __init__(self, growth: float | None, pad: int) -> None:
        """Check the growth; ``pad`` fills shorter windows."""
        factor = GROWTH if growth is None else growth
        if not is_real(factor) or factor < 1:
            raise OptionError(
                f"growth={factor!r}; allowed: a finite factor of at least 1", argument="growth"
            )
        self.slope, self._pad = math.log(factor), pad

    def measure(self, model: PreTrainedModel, items: Sequence[Example]) -> Measured:
        """Return the perplexity, and its logarithm as the loss."""
        held = batches(items, 1, self._pad)  # type: ignore[arg-type]
        loss = measure(model, "loss", held)
        return Measured(exponential(loss), loss)


class CallableScorer(Scorer):
    """A score returned by a callable, which may fall by ``delta``."""

    def __init__(self, score: ItemScore, delta: float | None) -> None:
        """Check how far the score may fall."""
        self.slack = 0.0 if delta is None else delta
        if not is_real(self.slack) or self.slack < 0:
            raise OptionError(f"delta={delta!r}; allowed: a finite number of at least 0")
        self._score = score
        self.name = getattr(score, "__name__", type(score).__name__)

    def measure(self, model: PreTrainedModel, items: Sequence[Any]) -> Measured:
        """Return the mean score, and its negative as the loss.

        Raises:
            EvaluationError: if a score is not finite, or there is not one per item.
        """
        with evaluating(model):
            found: Any = self._score(model, items)
        # A tensor or array of one number has no length.
        if not hasattr(found, "__iter__") or getattr(found, "ndim", None) == 0:
            value = finite(found, self.name)
            return Measured(value, -value)
        scores = tuple(finite(s, f"{self.name} of item {i}") for i, s in enumerate(found))
        if len(scores) != len(items):
            raise EvaluationError(
                f"{self.name} returned {len(scores)} scores for {len(items)} items; return one per "
                "item, or a single number"
            )
        value = math.fsum(scores) / len(scores)
        return Measured(value, -value, scores)
