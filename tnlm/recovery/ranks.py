"""The effective rank of a matrix: a diagnostic of pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from tnlm.errors import OptionError


def effective_rank(matrix: Tensor) -> float:
    """Return exp(entropy) of the singular values, normalised to sum 1.

    It is r for r equal singular values, and 0 for a zero matrix. Computed in float64.

    Args:
        matrix: ``(m, n)``.

    Raises:
        OptionError: if it is not a matrix, or not finite.

    Source: Roy and Vetterli 2007, "The effective rank".

    Example:
        >>> round(effective_rank(torch.eye(5)[:, :3]), 6)
        3.0
    """
    if matrix.dim() != 2 or not bool(matrix.isfinite().all()):
        raise OptionError(f"expected a finite matrix, got shape {tuple(matrix.shape)}")
    values = torch.linalg.svdvals(matrix.detach().double())
    total = float(values.sum())
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())
