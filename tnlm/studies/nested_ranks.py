"""All ranks of one matrix from one fit: smaller factors are slices of the largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tnlm.allocation.pricing import dense_cost, network_cost
from tnlm.calibration.metrics import Metric
from tnlm.decompositions.base import to_dict
from tnlm.decompositions.low_rank import FORMAT, LowRankSpec
from tnlm.errors import OptionError
from tnlm.layers.build import Entry
from tnlm.network import Factors
from tnlm.planning import LayerPlan
from tnlm.surgery import fit_target
from tnlm.targets import Target

CANDIDATES = tuple(step / 10 for step in range(1, 11))
"""Ranks that are tried, as parts of the one at which a matrix has as many numbers as before."""


@dataclass(frozen=True)
class Site:
    """A matrix, and the ranks at which it may be replaced.

    Attributes:
        target: the matrix.
        ranks: smallest first; all make it smaller.
        gauge: whether an identity block of the factors is not stored.
        extra: size of a bias that is added.
    """

    target: Target
    ranks: tuple[int, ...]
    gauge: bool
    extra: int

    def saved(self, rank: int) -> int:
        """Return how many numbers fewer there are at a rank."""
        return saved(self.target, rank, self.gauge, self.extra)


def site_of(
    target: Target, candidates: Sequence[float], *, gauge: bool = False, extra: int = 0
) -> Site:
    """Return a matrix with those of the candidate ranks that make it smaller.

    Args:
        target: the matrix ``(out, in)``.
        candidates: parts of the rank at which out x rank + rank x in is out x in.
        gauge: whether an identity block of the factors is not stored.
        extra: size of a bias that is added.

    Example:
        >>> site_of(Target("a", "a", "linear", (30, 60)), [1.0, 0.1, 0.5]).ranks
        (2, 10)
    """
    rows, columns = target.shape
    neutral = rows * columns / (rows + columns)
    ranks = sorted({max(1, math.floor(part * neutral)) for part in candidates})
    smaller = tuple(rank for rank in ranks if saved(target, rank, gauge, extra) > 0)
    return Site(target, smaller, gauge, extra)


def saved(target: Target, rank: int, gauge: bool, extra: int) -> int:
    """Return how many numbers fewer a matrix has at a rank.

    Example:
        >>> saved(Target("a", "a", "linear", (30, 60)), 10, gauge=False, extra=30)
        870
    """
    network = FORMAT.network(target.shape, LowRankSpec(rank, gauge))
    return target.params - network.params - extra


def check_candidates(candidates: Sequence[float]) -> None:
    """Refuse parts of the neutral rank outside (0, 1].

    Example:
        >>> check_candidates([0.5, 1.0])
    """
    if not candidates:
        raise OptionError("candidates=(); give parts of the parameter-neutral rank, in (0, 1]")
    for part in candidates:
        if not isinstance(part, int | float) or isinstance(part, bool) or not 0 < part <= 1:
            raise OptionError(
                f"candidates holds {part!r}; allowed: parts of the parameter-neutral rank, in "
                "(0, 1]"
            )


@dataclass(frozen=True)
class Rung:
    """A matrix at one rank: the decision, and what `fit_target` made of it."""

    layer: LayerPlan
    fit: tuple[Entry, nn.Module, float]


class Ladder:
    """One matrix, fitted once at its greatest rank.

    Under a separable metric the best factors of rank r are the first r columns and rows of the
    best factors of any greater rank.

    Args:
        site: the matrix and its ranks.
        weight: its values ``(out, in)``.
        bias: the bias beside it.
        metric: separable.
    """

    def __init__(self, site: Site, weight: Tensor, bias: Tensor | None, metric: Metric) -> None:
        """Fit; see the class for the arguments."""
        self.site, self._weight, self._bias, self._metric = site, weight, bias, metric
        self._factors = FORMAT.fit(weight, metric, LowRankSpec(site.ranks[-1], site.gauge))

    def factors(self, rank: int) -> Factors:
        """Return the factors of a rank: slices of the largest."""
        return {"left": self._factors["left"][:, :rank], "right": self._factors["right"][:rank]}

    def rung(self, rank: int) -> Rung:
        """Build the matrix at a rank."""
        site, size = self.site, self._weight.element_size()
        target, spec = site.target, LowRankSpec(rank, site.gauge)
        network = FORMAT.network(target.shape, spec)
        layer = LayerPlan(
            target.name,
            target.kind,
            target.shape,
            FORMAT.name,
            to_dict(spec),
            dense_cost(target, size),
            network_cost(target, network, size, site.extra),
            bias=site.extra > 0,
        )
        parts = target, self._weight, self._bias, self._metric
        fit = fit_target(*parts, layer, factors=self.factors(rank))
        return Rung(replace(layer, error=fit[2]), fit)
