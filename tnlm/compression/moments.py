"""Moments of a matrix's inputs in the compressed model, and the goal of its fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.calibration.statistics import ROWS

ANCHOR_DAMPING = 1e-2
"""Fraction of mean(diag(C~)) added to C~ and K: where inputs are small, W* stays close to W."""


@dataclass(frozen=True)
class Moved:
    """The goal of a fit.

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

    def move(self, weight: Tensor, centered: bool, anchor: float = 1.0) -> Moved:
        """Return the goal of the fit of a matrix with this input.

        Args:
            weight: the dense matrix, ``(out, in)``.
            centered: anchor centered inputs, because a bias corrects the means.
            anchor: fraction of the anchoring.
        """
        full = weight.detach().double()
        statistics = {"moment": self.moment, "mean": self.mean, "magnitude": self.magnitude}
        if self.cross is None or self.dense_mean is None:
            return Moved(full, statistics, full @ self.mean)
        moment, cross = self.moment, self.cross
        if centered:
            moment = moment - torch.outer(self.mean, self.mean)
            cross = cross - torch.outer(self.dense_mean, self.mean)
        best = anchored(full, moment, cross, fraction=anchor)
        return Moved(best, statistics, full @ torch.lerp(self.mean, self.dense_mean, anchor))


def anchored(
    weight: Tensor,
    moment: Tensor,
    cross: Tensor,
    damping: float | None = None,
    fraction: float = 1.0,
) -> Tensor:
    """Return W* = W K C~^-1, the matrix whose output on x~ is nearest to that of W on x.

    With a fraction a, it is nearest to that of W on x~ + a (x - x~):
    ``W* = W + a W E[(x - x~) x~.T] C~^-1``.

    Args:
        weight: W, ``(out, in)``, float64.
        moment: C~ = E[x~ x~.T], ``(in, in)``.
        cross: K = E[x x~.T], ``(in, in)``.
        damping: fraction of the mean diagonal of C~ added to both.
        fraction: a; 1 for all of the correction, 0 for W itself.

    Example:
        >>> weight, moment = torch.ones(1, 2).double(), torch.eye(2).double()
        >>> anchored(weight, moment, 2 * moment, damping=1e-9).round(decimals=6)
        tensor([[2., 2.]], dtype=torch.float64)
    """
    share = ANCHOR_DAMPING if damping is None else damping
    ridge = share * float(moment.diagonal().mean())
    if ridge <= 0:  # the compressed input is zero: nothing to correct
        return weight
    damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    change: Tensor = torch.linalg.solve(damped, (cross - moment).T).T
    return weight + fraction * (weight @ change)


class Sums:
    """Sums of moments over batches: products in float32, sums in float64."""

    def __init__(self) -> None:
        """Start empty."""
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
        """Return the sums divided by the number of tokens."""
        return Moments(*(total / tokens for total in self._sums))
