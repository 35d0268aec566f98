"""How the error of several matrices of one shape is measured: each in its own metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tnlm.metrics.metric import Metric


class Several(Metric):
    """The weighted sum of squared errors of the matrices in a stack ``(count, out, in)``.

    Args:
        parts: return the metric of each matrix; called whenever it is needed, as all at once may
            take more memory than there is.
        scales: weights of their squared errors.

    Example:
        >>> two = Several([Metric, Metric], [1.0, 3.0])
        >>> two.norm(torch.ones(2, 1, 1))
        2.0
    """

    def __init__(self, parts: Sequence[Callable[[], Metric]], scales: Sequence[float]) -> None:
        """Hold the parts; see the class for the arguments."""
        super().__init__()
        self.parts, self.scales = parts, scales

    @classmethod
    def of(cls, metric: Metric, count: int) -> Several:
        """Return a metric that is one of several matrices, or that of each of ``count``."""
        return metric if isinstance(metric, cls) else cls([lambda: metric] * count, [1.0] * count)

    def each(self, stack: Tensor) -> Iterator[tuple[Tensor, Metric, float]]:
        """Yield every matrix with its metric, and its weighted squared norm."""
        for matrix, part, scale in zip(stack, self.parts, self.scales, strict=True):
            metric = part()
            yield matrix, metric, scale * metric.norm(matrix) ** 2

    def norm(self, error: Tensor, *, keep: bool = True) -> float:
        """Return the norm of a stack ``(count, out, in)``; no part is there to keep anything."""
        return math.sqrt(sum(energy for _, _, energy in self.each(error)))

    def spectrum(self, weight: Tensor) -> Tensor:
        """Return the weighted sums of squared singular values, largest first."""
        spectra = [
            scale * part().spectrum(matrix)
            for matrix, part, scale in zip(weight, self.parts, self.scales, strict=True)
        ]
        return torch.stack(spectra).sum(0)
