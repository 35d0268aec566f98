"""Column weights from the movement scores of pruning."""

from __future__ import annotations

from torch import Tensor

from tnlm.errors import OptionError

FLOOR = 1e-6
"""Smallest weight of a column, relative to the mean."""


def column_weights(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the weights of the columns of a pruned matrix's error, ``(in,)`` in float64.

    The weight of a column, which is one input (a row, where papers write xW), is the sum of the
    scores of its kept entries. The paper does not define the treatment of negative scores; here,
    they count as 0, as masked entries do, since shrinking such an entry lowers the loss. The sums
    are scaled to mean 1 and clamped to a floor, so that no column has weight 0.

    Args:
        scores: ``(out, in)``.
        mask: ``(out, in)``, True for kept entries. If no kept score is positive, all columns have
            the same weight.

    Raises:
        OptionError: if the shapes differ, or a score is not finite.

    Source: LPAF, Ren and Zhu 2023, arXiv 2306.14152.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[3.0, -1.0, 0.5], [-1.0, 2.0, 0.5]])
        >>> column_weights(scores, scores > 0.6)
        tensor([1.8000e+00, 1.2000e+00, 1.0000e-06], dtype=torch.float64)
    """
    if scores.shape != mask.shape:
        raise OptionError(f"scores {tuple(scores.shape)} and a mask {tuple(mask.shape)} differ")
    if not bool(scores.isfinite().all()):
        raise OptionError("scores must be finite")
    sums = scores.double().clamp_min(0.0).masked_fill(~mask, 0.0).sum(0)
    mean = float(sums.mean())
    return (sums / mean).clamp_min(FLOOR) if mean > 0 else sums + 1.0
