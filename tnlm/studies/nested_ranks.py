"""Low-rank factors of one matrix at every rank, from a single fit."""

from __future__ import annotations

from torch import Tensor

from tnlm.decompositions.low_rank import FORMAT, LowRankSpec
from tnlm.metrics.metric import Metric
from tnlm.tensors.network import Factors


class NestedRanks:
    """Fits a matrix once, at the largest rank; smaller factors are slices of these.

    Under a separable metric the best factors of rank r are the first r columns and rows of the best
    factors of any larger rank (Eckart-Young).

    Args:
        weight: ``(out, in)``.
        metric: a separable one.
        largest: the largest rank that is needed.
        gauge: whether an identity block of the factors is not stored.

    Example:
        >>> import torch
        >>> nested = NestedRanks(torch.randn(4, 3), Metric(), largest=3)
        >>> [tuple(factor.shape) for factor in nested.factors(2).values()]
        [(4, 2), (2, 3)]
    """

    def __init__(
        self, weight: Tensor, metric: Metric, largest: int, *, gauge: bool = False
    ) -> None:
        """Fit; see the class for the arguments."""
        self.largest = largest
        self._factors = FORMAT.fit(weight, metric, LowRankSpec(largest, gauge))

    def factors(self, rank: int) -> Factors:
        """Return the factors ``left`` (out, rank) and ``right`` (rank, in), in float64."""
        return {"left": self._factors["left"][:, :rank], "right": self._factors["right"][:rank]}
