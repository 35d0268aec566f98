"""Kept rows that predict the others: the regression behind fewer channels and fewer heads."""

from __future__ import annotations

import torch
from torch import Tensor

from tnlm.metrics.metric import Metric


def moment_of(weight: Tensor, metric: Metric) -> Tensor:
    """Return the second moment of the hidden values, a full ``(hidden, hidden)`` matrix."""
    if metric.outputs is None:
        return torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)
    values = metric.outputs.values
    return values.diag() if metric.outputs.is_diagonal else values


def weighted(weight: Tensor, metric: Metric) -> Tensor:
    """Return the ``(hidden, out)`` matrix with its columns weighted by the effect of outputs."""
    wide = weight.detach().double()
    return wide if metric.inputs is None else metric.inputs.scale(wide)


def ridged(block: Tensor) -> Tensor:
    """Return a block of a moment with a small ridge, invertible despite inactive values."""
    ridge = 1e-10 * float(block.diagonal().mean()) or 1.0
    return block + ridge * torch.eye(len(block), dtype=block.dtype, device=block.device)


def refitted(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """Return the best rows ``(kept, out)`` of a projection that reads only the kept values.

    With C the moment and W the ``(hidden, out)`` projection, they are ``C[K, K]^-1 C[K] W``.

    Example:
        >>> refitted(torch.tensor([[1.0], [2.0]]), torch.ones(2, 2).double(), torch.tensor([0]))
        tensor([[3.0000]], dtype=torch.float64)
    """
    cross = moment[kept] @ weight.detach().double()
    rows: Tensor = torch.linalg.solve(ridged(moment[kept][:, kept]), cross)
    return rows
