"""Moments of the inputs that a compressed model gives a matrix, and what it is fitted to then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.calibration.statistics import ROWS

ANCHOR_DAMPING = 1e-2
"""Share of mean(diag(C~)) added to C~ and K: where the data says little, W* stays W."""


@dataclass(frozen=True)
class Moved:
    """What a matrix is to be fitted to.

    Attributes:
        weight: ``(out, in)`` matrix to approximate: the dense one, or the anchored W*.
        statistics: ``moment``, ``mean`` and ``magnitude`` of the compressed input.
        output: mean output ``(out,)`` of the dense matrix, without its bias.
    """

    weight: Tensor
    statistics: Mapping[str, Tensor]
    output: Tensor


@dataclass(frozen=True)
class Moments:
    """Means over tokens of a compressed input x~, and of its products with the dense x."""

    moment: Tensor
    mean: Tensor
    magnitude: Tensor
    cross: Tensor | None = None
    dense_mean: Tensor | None = None

    def move(self, weight: Tensor, centered: bool) -> Moved:
        """Return what a matrix with this input is to be fitted to."""
        full = weight.detach().double()
        statistics = {"moment": self.moment, "mean": self.mean, "magnitude": self.magnitude}
        if self.cross is None or self.dense_mean is None:
            return Moved(full, statistics, full @ self.mean)
        moment, cross = self.moment, self.cross
        if centered:
            moment = moment - torch.outer(self.mean, self.mean)
            cross = cross - torch.outer(self.dense_mean, self.mean)
        return Moved(anchored(full, moment, cross), statistics, full @ self.dense_mean)


def anchored(weight: Tensor, moment: Tensor, cross: Tensor, damping: float | None = None) -> Tensor:
    """Return W* = W K C~^-1, the matrix whose output on x~ is nearest to that of W on x.

    Args:
        weight: W, ``(out, in)``, float64.
        moment: C~ = E[x~ x~.T], ``(in, in)``.
        cross: K = E[x x~.T], ``(in, in)``.
        damping: share of the mean diagonal of C~ that is added to both.

    Example:
        >>> weight, moment = torch.ones(1, 2).double(), torch.eye(2).double()
        >>> anchored(weight, moment, 2 * moment, damping=1e-9).round(decimals=6)
        tensor([[2., 2.]], dtype=torch.float64)
    """
    share = ANCHOR_DAMPING if damping is None else damping
    ridge = share * float(moment.diagonal().mean())
    if ridge <= 0:  # the compressed input is silent: nothing to correct
        return weight
    damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    change: Tensor = torch.linalg.solve(damped, (cross - moment).T).T
    return weight + weight @ change


class Sums:
    """Products in the model's precision, sums in float64."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self._sums: list[Tensor] = []

    def add(self, compressed: Tensor, dense: Tensor | None = None) -> None:
        """Add the rows of one batch."""
        y = compressed.reshape(-1, compressed.shape[-1]).float()
        x = None if dense is None else dense.reshape(-1, dense.shape[-1]).float()
        for start in range(0, len(y), ROWS):
            b = y[start : start + ROWS]
            parts = [b.T @ b, b.sum(0), b.abs().sum(0)]
            if x is not None:
                a = x[start : start + ROWS]
                parts += [a.T @ b, a.sum(0)]
            if not self._sums:
                self._sums = [torch.zeros_like(part, dtype=torch.float64) for part in parts]
            for total, part in zip(self._sums, parts, strict=True):
                total += part

    def means(self, tokens: int) -> Moments:
        """Return the sums by the token."""
        return Moments(*(total.cpu() / tokens for total in self._sums))
