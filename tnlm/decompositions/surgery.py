"""Removing rows and columns of a matrix, and updating the rest, under a two-sided metric."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnlm.errors import CalibrationError

FLOOR = 1e-12
"""Fraction of the mean diagonal added to a matrix that is not definite."""


def removal_losses(weight: Tensor, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the loss grows by if a row, or a column, is removed and the rest updated.

    The loss is ``tr(G D A D.T) / 2`` for a change D of the weight. Removing row r costs
    ``w_r.T A w_r / 2 [G^-1]_rr`` and column c ``w_c.T G w_c / 2 [A^-1]_cc``.

    Args:
        weight: ``(out, in)``, float64.
        outputs: G, ``(out, out)``, positive definite.
        inputs: A, ``(in, in)``, positive definite.

    Source: LLM Surgeon, van der Ouderaa et al. 2024, arXiv 2312.17244, after the optimal brain
    surgeon (Hassibi and Stork 1992).

    Example:
        >>> rows, columns = removal_losses(torch.tensor([[2.0, 1.0]]).double(),
        ...                                torch.eye(1).double(), 4 * torch.eye(2).double())
        >>> rows.tolist(), columns.tolist()
        ([10.0], [8.0, 2.0])
    """
    rows = ((weight @ inputs) * weight).sum(1) / _inverse_diagonal(outputs)
    columns = ((outputs @ weight) * weight).sum(0) / _inverse_diagonal(inputs)
    return rows / 2, columns / 2


def remaining(
    weight: Tensor, outputs: Tensor, inputs: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Return the kept rows and columns, updated for the least loss without the others.

    With K the kept rows and L the kept columns, ``G_KK^-1 (G W A)_KL A_LL^-1`` minimises
    ``tr(G D A D.T)`` among all matrices that are zero elsewhere.

    Args:
        weight: ``(out, in)``, float64.
        outputs: G, ``(out, out)``, positive definite.
        inputs: A, ``(in, in)``, positive definite.
        rows: indices of the kept rows.
        columns: indices of the kept columns.

    Source: the correlated update of LLM Surgeon, arXiv 2312.17244, for rows and columns at once.

    Example:
        >>> two = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
        >>> remaining(torch.eye(2).double(), two, two, torch.tensor([0]), torch.tensor([0, 1]))
        tensor([[1.0000, 0.5000]], dtype=torch.float64)
    """
    tall = _kept_rows(weight, outputs, rows)
    return _kept_rows(tall.T, inputs, columns).T


def as_order(kept: Tensor, size: int) -> Tensor:
    """Return a permutation that starts with the kept indices, followed by the others.

    Example:
        >>> as_order(torch.tensor([2, 0]), 4).tolist()
        [0, 2, 1, 3]
    """
    others = torch.ones(size, dtype=torch.bool, device=kept.device)
    others[kept] = False
    return torch.cat([kept.sort().values, others.nonzero()[:, 0]])


def _kept_rows(weight: Tensor, side: Tensor, kept: Tensor) -> Tensor:
    """Return ``W_K + S_KK^-1 S_KR W_R``, with R the rows that are removed."""
    if len(kept) == len(weight):
        return weight[kept]
    removed = as_order(kept, len(weight))[len(kept) :]
    pulled = side[kept][:, removed] @ weight[removed]
    return weight[kept] + torch.cholesky_solve(pulled, _root(side[kept][:, kept]))


def _inverse_diagonal(side: Tensor) -> Tensor:
    return torch.cholesky_inverse(_root(side)).diagonal()


def _root(side: Tensor) -> Tensor:
    """Return the Cholesky factor, of a slightly damped matrix if it is singular.

    Raises:
        CalibrationError: if it is not finite, or not the weighting of anything.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(side)
    mean = float(side.diagonal().mean()) or 1.0
    ridge = FLOOR * mean
    while bool(failed) or not math.isfinite(mean):
        if not 0.0 < ridge <= mean < math.inf:
            raise CalibrationError(
                "a second moment is not finite or has negative eigenvalues; check the model's "
                "weights and dtype on the calibration data"
            )
        root, failed = torch.linalg.cholesky_ex(side + ridge * torch.eye(len(side)).to(side))
        ridge *= 10
    return root
