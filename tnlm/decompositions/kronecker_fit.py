"""Factors of a sum of Kronecker products: the nearest in the Frobenius norm, and their scaling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnlm.decompositions.whitening import Decompose
from tnlm.tensors.linalg import truncated_svd
from tnlm.tensors.network import Factors, Network
from tnlm.tensors.rearrange import rearrange


def low_rank_factors(network: Network, left: Tensor, right: Tensor) -> Factors:
    """Return a product ``left @ right`` as a sum of Kronecker products of columns and rows.

    Args:
        network: a network of modes ``tac,tbd->abcd`` in which a and d, or b and c, are 1.
        left: ``(out, terms)``.
        right: ``(terms, in)``.
    """
    pair = left.T, right
    if not network.sizes["b"] == network.sizes["c"] == 1:
        pair = right, left.T
    return {
        name: rows.reshape(network.shape_of(name))
        for name, rows in zip(network.factors, pair, strict=True)
    }


def nearest(terms: int, out_split: Sequence[int], in_split: Sequence[int]) -> Decompose:
    """Return a function that fits a tensor of modes (a, b, c, d) in the Frobenius norm."""
    (a, b), (c, d) = out_split, in_split

    def decompose(tensor: Tensor) -> Factors:
        rows = rearrange(tensor.reshape(a * b, c * d), out_split, in_split)
        svd = truncated_svd(rows, terms)
        root = svd.s.sqrt()
        return {
            "left": (svd.u * root).T.reshape(-1, a, c),
            "right": (root[:, None] * svd.vh).reshape(-1, b, d),
        }

    return decompose


def balanced(factors: Factors) -> Factors:
    """Return the same sum with orthogonal terms, with both sides scaled by the root of sigma."""
    left, right = factors["left"], factors["right"]
    outer, r_outer = torch.linalg.qr(left.flatten(1).T)
    inner, r_inner = torch.linalg.qr(right.flatten(1).T)
    svd = truncated_svd(r_outer @ r_inner.T, method="exact")
    root = svd.s.sqrt()
    return {
        "left": (outer @ (svd.u * root)).T.reshape(left.shape),
        "right": (root[:, None] * (svd.vh @ inner.T)).reshape(right.shape),
    }
