"""Rounds a matrix to a grid: its scales by search, its codes to the nearest, or with feedback."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlm.precision.grid import Precision

SHRINK = tuple(1.0 - step / 32 for step in range(14))
"""Scales that are tried, as fractions of the one that reaches the largest weight."""
BLOCK = 64
"""Columns whose errors are fed back to the rest at once."""


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid: ``scale * (code - zero)``, group by group.

    Attributes:
        precision: the grid.
        codes: ``(rows, columns)``, uint8.
        scales: ``(rows, groups)``, in the dtype in which they are stored.
        zeros: ``(rows, groups)``, uint8; None where zero is the middle code.
    """

    precision: Precision
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def values(self) -> Tensor:
        """Return the matrix that is stored, float64.

        Example:
            >>> stored = nearest(torch.tensor([[1.0, -2.0, 0.5]]), Precision(8))
            >>> (stored.values() - torch.tensor([[1.0, -2.0, 0.5]])).abs().max() < 0.01
            tensor(True)
        """
        columns = self.codes.shape[1]
        width = self.precision.width(columns)
        scale, zero = _spread(self, width, columns)
        return scale * (self.codes.double() - zero)


def nearest(
    weight: Tensor,
    precision: Precision,
    importance: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Rounded:
    """Round every weight to the nearest code.

    Args:
        weight: ``(out, in)``.
        precision: the grid.
        importance: of the columns ``(in,)``, by which scales are chosen; all alike if None.
        dtype: of the scales; that of ``weight`` if None.
    """
    scales, zeros = _scales(weight.detach().double(), precision, importance, dtype or weight.dtype)
    grid = Rounded(precision, torch.empty(weight.shape, dtype=torch.uint8), scales, zeros)
    scale, zero = _spread(grid, precision.width(weight.shape[1]), weight.shape[1])
    return Rounded(precision, _codes(weight.double(), scale, zero, precision), scales, zeros)


def with_feedback(
    weight: Tensor,
    moment: Tensor,
    precision: Precision,
    dtype: torch.dtype | None = None,
    damping: float = 0.01,
) -> Rounded:
    """Round column by column, so that later columns make up for the errors of earlier ones.

    Columns are taken in the order of their diagonal entries in the moment; scales are chosen first
    and do not change. If the result is worse than :func:`nearest` in the moment's norm, that of
    :func:`nearest` is returned.

    Args:
        weight: ``(out, in)``.
        moment: second moment of the inputs ``(in, in)``.
        precision: the grid.
        dtype: of the scales; that of ``weight`` if None.
        damping: fraction of the mean diagonal that is added to the moment.

    Source: GPTQ, Frantar et al. 2022, arXiv 2210.17323, with its order by activations.

    Example:
        >>> moment = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> weight = torch.tensor([[0.3, 0.8]])
        >>> stored = with_feedback(weight, moment, Precision(2)).values()
        >>> stored.shape
        torch.Size([1, 2])
    """
    weight, moment = weight.detach(), moment.detach().double()
    plain = nearest(weight, precision, moment.diagonal(), dtype or weight.dtype)
    full = weight.double()
    scale, zero = _spread(plain, precision.width(full.shape[1]), full.shape[1])
    order = moment.diagonal().argsort(descending=True, stable=True)
    root = _inverse_root(moment[order][:, order], damping)
    codes = _fed_back(full[:, order], scale[:, order], zero[:, order], root, precision)
    back = torch.empty_like(plain.codes)
    back[:, order] = codes
    found = Rounded(precision, back, plain.scales, plain.zeros)
    return min((found, plain), key=lambda each: squared_error(full, each, moment))


def moved(stored: Rounded, change: Tensor) -> Rounded:
    """Return the nearest codes to what is stored plus a change, on the same scales.

    Example:
        >>> stored = nearest(torch.tensor([[1.0, -0.5]]), Precision(4))
        >>> moved(stored, torch.tensor([[0.0, 0.25]])).values().round(decimals=2).tolist()
        [[1.0, -0.25]]
    """
    columns = stored.codes.shape[1]
    scale, zero = _spread(stored, stored.precision.width(columns), columns)
    wanted = stored.values() + change.double()
    return replace(stored, codes=_codes(wanted, scale, zero, stored.precision))


def squared_error(weight: Tensor, stored: Rounded, moment: Tensor) -> float:
    """Return the squared error ``tr(E C E.T)`` of what is stored."""
    error = weight.double() - stored.values()
    return float(((error @ moment) * error).sum())


def conditional_variances(moment: Tensor, damping: float = 0.01) -> Tensor:
    """Return the variance of every column given those that are rounded after it.

    Example:
        >>> found = conditional_variances(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), damping=0.0)
        >>> found.round(decimals=6).tolist()
        [1.0, 1.0]
    """
    moment = moment.detach().double()
    order = moment.diagonal().argsort(descending=True, stable=True)
    variances = torch.empty(len(moment), dtype=moment.dtype, device=moment.device)
    variances[order] = _inverse_root(moment[order][:, order], damping).diagonal() ** -2
    return variances


def _fed_back(
    weight: Tensor, scale: Tensor, zero: Tensor, root: Tensor, precision: Precision
) -> Tensor:
    """Return the codes of ordered columns; ``root`` is the upper root of the inverse moment."""
    left, columns = weight.clone(), weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = left.new_empty(len(left), end - start)
        for column in range(start, end):
            now, steps = left[:, column], scale[:, column]
            chosen = _codes(now, steps, zero[:, column], precision)
            codes[:, column] = chosen
            error = (now - steps * (chosen.double() - zero[:, column])) / root[column, column]
            left[:, column:end] -= error.unsqueeze(1) * root[column, column:end]
            errors[:, column - start] = error
        left[:, end:] -= errors @ root[start:end, end:]
    return codes


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """Return the upper triangular R with ``R.T @ R`` the inverse of the damped moment."""
    mean = float(moment.diagonal().mean()) or 1.0
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment + damping * mean * eye))
    root: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return root


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, precision: Precision) -> Tensor:
    codes = torch.round(weight / scale + zero).clamp_(0, precision.levels - 1)
    return codes.to(torch.uint8)


def _spread(stored: Rounded, width: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero of every column, float64."""
    scale = stored.scales.double().repeat_interleave(width, 1)[:, :columns]
    if stored.zeros is None:
        return scale, torch.full_like(scale, stored.precision.levels // 2)
    return scale, stored.zeros.double().repeat_interleave(width, 1)[:, :columns]


def _scales(
    weight: Tensor, precision: Precision, importance: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Choose the scale of every group, and its zero, by the weighted error of rounding."""
    weight = weight.float()  # scales are only chosen here
    columns = weight.shape[1]
    width = precision.width(columns)
    missing = -columns % width
    weighed = weight.new_ones(columns) if importance is None else importance.to(weight)
    groups = F.pad(weight, (0, missing)).unflatten(1, (-1, width))
    counts = F.pad(weighed.clamp_min(0.0), (0, missing)).unflatten(0, (-1, width))
    counts = counts + 1e-6 * counts.mean(1, keepdim=True)
    best = groups.new_full(groups.shape[:2], torch.inf)
    scales, zeros = torch.ones_like(best), torch.zeros_like(best)
    for scale, zero in _tried(groups, precision, dtype):
        codes = torch.round(groups / scale.unsqueeze(2) + zero.unsqueeze(2))
        codes = codes.clamp_(0, precision.levels - 1)
        error = groups - scale.unsqueeze(2) * (codes - zero.unsqueeze(2))
        harm = (error.square_() * counts).sum(2)
        better = harm < best
        best = torch.where(better, harm, best)
        scales = torch.where(better, scale, scales)
        zeros = torch.where(better, zero, zeros)
    return scales.to(dtype), None if precision.symmetric else zeros.to(torch.uint8)


def _tried(groups: Tensor, precision: Precision, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return scales and zeros to try, as they can be stored.

    With a middle code there is one more code on one side, where the larger weights are put: the
    scale then has a sign.
    """
    tried = []
    low = groups.amin(2).clamp_max(0.0)
    high = groups.amax(2).clamp_min(0.0)
    top = precision.levels - 1
    for shrink in SHRINK:
        if precision.symmetric:
            middle = precision.levels // 2
            reach = torch.where(high > -low, high, low)  # becomes code 0
            scale = _storable(-reach * shrink / middle, dtype)
            tried.append((scale, torch.full_like(scale, middle)))
        else:
            scale = _storable((high - low) * shrink / top, dtype)
            tried.append((scale, torch.round(-low * shrink / scale).clamp_(0, top)))
    return tried


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales as they can be stored: rounded to their dtype, and never zero."""
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # the smallest above zero
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale)
    return (sign * scale.abs().clamp_min(least)).to(dtype).to(scale.dtype)
