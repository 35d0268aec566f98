"""Orthogonal rank-one terms of a tensor, from which CP is fitted, and the norms of its columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tnlm.tensors.network import Factors


def term_energies(tensor: Tensor) -> Tensor:
    """Return the squared weights of the orthogonal terms of a tensor, largest first.

    Example:
        >>> term_energies(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])).round().tolist()
        [16.0, 9.0]
    """
    weights = torch.ones(1, dtype=tensor.dtype, device=tensor.device)
    for _, kept in _levels(tensor):
        weights = (weights[:, None] * kept.S).flatten()
    return weights.square().sort(descending=True).values


def largest_terms(tensor: Tensor, rank: int) -> Factors:
    """Return the ``rank`` largest of the orthogonal rank-one terms whose sum is the tensor.

    One mode after another, the shortest first, is split off by SVDs, each of which makes a term of
    the last level into several. The terms are orthogonal to each other, so that the squared error
    is the sum of the squared weights left out. There are never more terms than entries divided by
    the longest mode, and as many are exact.

    Args:
        tensor: with two modes or more.
        rank: number of terms; missing ones are zero.

    Returns:
        ``mode0``, ``mode1``, ..., each ``(size, rank)``, of unit columns but for the last.

    Source: TTr1SVD, Batselier, Liu and Wong 2014, arXiv 1407.4541.

    Example:
        >>> terms = largest_terms(torch.eye(2).reshape(2, 1, 2), 1)
        >>> [tuple(factor.shape) for factor in terms.values()]
        [(2, 1), (1, 1), (2, 1)]
    """
    weights = torch.ones(1, dtype=tensor.dtype, device=tensor.device)
    columns: dict[int, Tensor] = {}
    for mode, kept in _levels(tensor):
        count = kept.S.shape[1]
        columns = {k: rows.repeat_interleave(count, 0) for k, rows in columns.items()}
        columns[mode] = kept.U.mT.flatten(0, 1)
        weights, last = (weights[:, None] * kept.S).flatten(), kept.Vh.flatten(0, 1)
    [rest] = set(range(tensor.dim())) - set(columns)
    columns[rest] = last
    chosen = weights.argsort(descending=True, stable=True)[:rank]
    factors = {}
    for mode in range(tensor.dim()):
        found = tensor.new_zeros(tensor.shape[mode], rank)
        found[:, : len(chosen)] = columns[mode][chosen].T
        if mode == tensor.dim() - 1:
            found[:, : len(chosen)] *= weights[chosen]
        factors[f"mode{mode}"] = found
    return factors


def _levels(tensor: Tensor) -> Iterator[tuple[int, Any]]:
    """Yield every mode but the longest, shortest first, with the SVDs that split it off.

    The SVDs of a level are batched over the terms so far.
    """
    order = sorted(range(tensor.dim()), key=tensor.shape.__getitem__)
    rest = tensor.permute(order).reshape(1, -1)
    for mode in order[:-1]:
        size = tensor.shape[mode]
        kept = torch.linalg.svd(rest.reshape(len(rest), size, -1), full_matrices=False)
        yield mode, kept
        rest = kept.Vh.flatten(0, 1)


def normalised(factors: Factors) -> Factors:
    """Return the same sum with unit columns in every factor but the last, which has the weights.

    Example:
        >>> pair = {"mode0": torch.tensor([[2.0]]), "mode1": torch.tensor([[3.0]])}
        >>> {name: float(factor) for name, factor in normalised(pair).items()}
        {'mode0': 1.0, 'mode1': 6.0}
    """
    *names, last = factors
    found = dict(factors)
    for name in names:
        norms = found[name].norm(dim=0)
        found[name] = found[name] / torch.where(norms > 0, norms, 1.0)
        found[last] = found[last] * norms
    return found
