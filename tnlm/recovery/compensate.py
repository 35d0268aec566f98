"""Merges a LoRA with a low-rank matrix ``left @ right``, and initialises LoRAs by residuals.

A LoRA can be kept beside the product (r * (in + out) more parameters), concatenated to the factors
(exact, with rank k + r), or merged and truncated to rank k, optimally under a metric.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnlm.errors import RankError
from tnlm.layers.adapters import Lora
from tnlm.metrics.metric import Metric


def concatenate(left: Tensor, right: Tensor, lora: Lora) -> tuple[Tensor, Tensor]:
    """Return ``[left, scaling B]`` and ``[right; A]``, whose product is exactly the sum.

    Args:
        left: ``(out, k)``.
        right: ``(k, in)``.
        lora: a LoRA of rank r.

    Returns:
        ``(out, k + r)`` and ``(k + r, in)``, in the dtype of the factors.

    Example:
        >>> lora = Lora(torch.ones(1, 3), torch.ones(2, 1))
        >>> left, right = concatenate(torch.eye(2), torch.zeros(2, 3), lora)
        >>> left.shape, (left @ right).tolist()
        (torch.Size([2, 3]), [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    """
    up, down = (lora.scaling * lora.B.detach()).to(left), lora.A.detach().to(right)
    return torch.cat([left, up], 1), torch.cat([right, down])


def retruncate(
    left: Tensor, right: Tensor, lora: Lora, metric: Metric, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the best factors of a given rank, under a metric, for the sum of a product and a LoRA.

    Args:
        left: ``(out, k)``.
        right: ``(k, in)``.
        lora: the LoRA to merge.
        metric: a separable metric for the error.
        rank: rank of the result; k by default.

    Returns:
        ``(out, rank)`` and ``(rank, in)``, float64.

    Raises:
        RankError: if the matrix cannot have the rank.

    Example:
        >>> lora = Lora(torch.tensor([[0.0, 5.0]]), torch.tensor([[0.0], [1.0]]))
        >>> left, right = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]])
        >>> left, right = retruncate(left, right, lora, Metric())
        >>> (left @ right).abs().round().tolist()  # keeps the larger of 1 and 5
        [[0.0, 0.0], [0.0, 5.0]]
    """
    rank, most = left.shape[1] if rank is None else rank, min(len(left), right.shape[1])
    if not 1 <= rank <= most:
        raise RankError(
            f"rank={rank}; a {len(left)}x{right.shape[1]} matrix allows 1 to {most}",
            argument="rank",
        )
    return metric.low_rank(left.detach().double() @ right.detach().double() + lora.delta(), rank)


def residual_start(weight: Tensor, fitted: Tensor, rank: int, scaling: float = 1.0) -> Lora:
    """Return the LoRA nearest to an approximation's residual: the truncated SVD of ``W - W_k``.

    Both factors get the square root of the singular values, since both will be trained.

    Args:
        weight: W, ``(out, in)``.
        fitted: W_k, its approximation.
        rank: rank of the LoRA.
        scaling: scaling of the LoRA.

    Returns:
        The LoRA, in float32 or higher precision.

    Raises:
        RankError: if the matrix cannot have the rank.

    Example:
        >>> W = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> lora = residual_start(W, torch.diag(torch.tensor([4.0, 0.0, 0.0])), rank=1)
        >>> lora.delta().diagonal().abs().round().tolist()
        [0.0, 2.0, 0.0]
    """
    residual = weight.detach().double() - fitted.detach().double()
    if not 1 <= rank <= min(residual.shape):
        rows, columns = residual.shape
        raise RankError(
            f"rank={rank}; a {rows}x{columns} matrix allows 1 to {min(rows, columns)}",
            argument="rank",
        )
    U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return Lora((root[:, None] * Vh[:rank]).to(dtype), (U[:, :rank] * root).to(dtype), scaling)
