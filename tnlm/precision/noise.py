"""Predicts the error of rounding a matrix, without rounding it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlm.precision.grid import Precision
from tnlm.precision.rounding import conditional_variances


class Noise:
    """The squared error that rounding a matrix is expected to cause, on any grid.

    An error of rounding is uniform within a step. With feedback, what a column adds is its variance
    given the columns that come after it, which make up for the rest.

    Args:
        weight: ``(out, in)``.
        moment: second moment of the inputs, full ``(in, in)`` or diagonal ``(in,)``; the identity
            if None.
        rows: how much a squared error of each output counts ``(out,)``; one if None.

    Source: the error of successive quantization, Zador and Gersho; for GPTQ the pivots of the
    Cholesky factor as in Chen et al. 2025, arXiv 2507.18553.

    Example:
        >>> noise = Noise(torch.randn(8, 64))
        >>> 3.9 < noise.squared(Precision(3)) / noise.squared(Precision(4)) < 4.1
        True
    """

    def __init__(
        self, weight: Tensor, moment: Tensor | None = None, rows: Tensor | None = None
    ) -> None:
        """Find the variances; see the class for the arguments."""
        self._weight = weight.detach().double()
        columns = weight.shape[1]
        if moment is None:
            self._variances = self._weight.new_ones(columns)
        else:
            full = moment.dim() == 2
            self._variances = conditional_variances(moment) if full else moment.double()
        self._rows = self._weight.new_ones(len(weight)) if rows is None else rows.double()

    def squared(self, grid: Precision) -> float:
        """Return the expected squared error on a grid, weighted by outputs and inputs."""
        width, columns = grid.width(self._weight.shape[1]), self._weight.shape[1]
        missing = -columns % width
        groups = F.pad(self._weight, (0, missing)).unflatten(1, (-1, width))
        spread = F.pad(self._variances, (0, missing)).unflatten(0, (-1, width)).sum(1)
        if grid.symmetric:
            steps = groups.abs().amax(2) * 2 / grid.levels
        else:
            steps = (groups.amax(2) - groups.amin(2)) / (grid.levels - 1)
        return float(torch.einsum("r,rg,g->", self._rows, steps**2, spread)) / 12
