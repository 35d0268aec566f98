"""The ranks that one matrix may have, and the matrix at each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tnlm.decompositions.base import to_dict
from tnlm.decompositions.low_rank import FORMAT, LowRankSpec
from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.studies.nested_ranks import NestedRanks
from tnlm.targets.base import Fitted
from tnlm.targets.matrix import MatrixTarget
from tnlm.utils.checks import is_real

CANDIDATES = tuple(step / 10 for step in range(1, 11))
"""Candidate ranks, as fractions of the rank at which a matrix has as many parameters as before."""


@dataclass(frozen=True)
class MatrixRanks:
    """A matrix and its candidate ranks.

    Attributes:
        target: the matrix.
        ranks: in ascending order; each makes the matrix smaller.
        gauge: whether an identity block of the factors is not stored.
        extra: parameters of a bias that the replacement adds.
    """

    target: MatrixTarget
    ranks: tuple[int, ...]
    gauge: bool = False
    extra: int = 0

    @classmethod
    def of(
        cls,
        target: MatrixTarget,
        candidates: Sequence[float],
        *,
        gauge: bool = False,
        extra: int = 0,
    ) -> MatrixRanks:
        """Keep those candidates, fractions of the rank that saves nothing, which save something.

        Example:
            >>> MatrixRanks.of(MatrixTarget("a", "a", (30, 60)), [1.0, 0.1, 0.5]).ranks
            (2, 10)
        """
        rows, columns = target.shape
        neutral = rows * columns / (rows + columns)
        ranks = sorted({max(1, math.floor(part * neutral)) for part in candidates})
        every = cls(target, tuple(ranks), gauge, extra)
        return replace(every, ranks=tuple(rank for rank in ranks if every.saved(rank) > 0))

    def saved(self, rank: int) -> int:
        """Return how many parameters a rank saves.

        Example:
            >>> MatrixRanks(MatrixTarget("a", "a", (30, 60)), (10,), extra=30).saved(10)
            870
        """
        network = FORMAT.network(self.target.shape, LowRankSpec(rank, self.gauge))
        return self.target.params - network.params - self.extra


def check_candidates(candidates: Sequence[float]) -> None:
    """Raise `OptionError` unless all candidates are fractions in (0, 1].

    Example:
        >>> check_candidates([0.5, 1.0])
    """
    allowed = "allowed: fractions of the rank at which nothing is saved, in (0, 1]"
    if not candidates:
        raise OptionError(f"candidates=(); {allowed}", argument="candidates")
    for part in candidates:
        if not is_real(part) or not 0 < part <= 1:
            raise OptionError(f"candidates contains {part!r}; {allowed}")


@dataclass(frozen=True)
class RankFit:
    """A matrix fitted at one rank.

    Attributes:
        layer: the decision, with the error measured.
        fit: what replaces the matrix.
    """

    layer: LayerPlan
    fit: Fitted


class RankFits:
    """Builds one matrix at any of its candidate ranks.

    Args:
        matrix: the matrix and its candidate ranks.
        weight: its values ``(out, in)``.
        bias: its bias ``(out,)``, if it has one.
        metric: a separable one.
    """

    def __init__(
        self, matrix: MatrixRanks, weight: Tensor, bias: Tensor | None, metric: Metric
    ) -> None:
        """Fit at the largest rank; see the class for the arguments."""
        self._matrix, self._weight, self._bias, self._metric = matrix, weight, bias, metric
        self._nested = NestedRanks(weight, metric, matrix.ranks[-1], gauge=matrix.gauge)

    def at(self, rank: int) -> RankFit:
        """Return the matrix at a rank."""
        matrix, size = self._matrix, self._weight.element_size()
        target, spec = matrix.target, LowRankSpec(rank, matrix.gauge)
        network = FORMAT.network(target.shape, spec)
        layer = LayerPlan(
            target.name,
            target.kind,
            target.shape,
            FORMAT.name,
            to_dict(spec),
            target.dense_cost(size),
            target.cost(network, size, matrix.extra),
            bias=matrix.extra > 0,
        )
        factors = self._nested.factors(rank)
        fit = target.fit_to(self._weight, self._bias, layer, self._metric, factors=factors)
        return RankFit(replace(layer, error=fit.error), fit)
