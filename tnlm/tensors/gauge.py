"""Gauge-fixed storage: one factor of a bond has an identity block, which is not stored.

A product ``F @ G`` with inner size r does not change under ``F @ X, inverse(X) @ G``, so r**2 of
its parameters are redundant. With r pivot rows P of F,
``F @ G = (F @ inverse(F[P])) @ (F[P] @ G)``; the first factor has an identity at P, and the second
holds rows of the product itself. Source: the pivoting of PIFA (arXiv 2501.19090) and the junction
matrix of LatentLLM (arXiv 2505.18413), here for any bond of any network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tnlm.tensors.linalg import pivot_rows
from tnlm.tensors.network import Factors, Network

ORDER = "_order"
"""Suffix of the tensor that stores the row order of a gauge-fixed factor."""


def fix(network: Network, factors: Factors) -> Factors:
    """Fix the gauge of a network's factors, and return the tensors to store.

    Args:
        network: names the gauge; without one, the factors are returned unchanged.
        factors: all full factors, in float64 for full accuracy.

    Returns:
        The factors; the gauged one as its free rows ``(rows - r, r)`` with ``<factor>_order``
        (int64, one entry per row). No free coefficient exceeds 2.

    Example:
        >>> from tnlm.tensors.network import Gauge, Network
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5},
        ...               Gauge("left", "a"))
        >>> full = {"left": torch.randn(6, 2).double(), "right": torch.randn(2, 5).double()}
        >>> stored = fix(net, full)
        >>> stored["left"].shape, net.params
        (torch.Size([4, 2]), 18)
        >>> back = expand(net, stored)
        >>> bool(torch.allclose(back["left"] @ back["right"], full["left"] @ full["right"]))
        True
    """
    if network.gauge is None:
        return factors
    name, bond = network.gauge.factor, network.gauge.bond
    partner = next(n for n, modes in network.factors.items() if bond in modes and n != name)
    basis, mixing = torch.linalg.qr(_unfold(factors[name], network.factors[name], bond))
    pivots = pivot_rows(basis)
    free = torch.ones(len(basis), dtype=torch.bool, device=basis.device)
    free[pivots] = False
    order = torch.cat([pivots, free.nonzero()[:, 0]]).argsort()
    coefficients = torch.linalg.solve(basis[pivots], basis[free], left=False)
    axis = network.factors[partner].index(bond)
    product = torch.tensordot(basis[pivots] @ mixing, factors[partner], dims=([1], [axis]))
    return {
        **factors,
        name: coefficients,
        name + ORDER: order,
        partner: product.movedim(0, axis).contiguous(),
    }


def expand(network: Network, stored: Factors) -> Factors:
    """Return all full factors: the inverse of :func:`fix`, up to the gauge."""
    if network.gauge is None:
        return stored
    name, bond = network.gauge.factor, network.gauge.bond
    rows = with_identity(stored[name], stored[name + ORDER])
    others = network.factors[name].replace(bond, "")
    full = rows.reshape(*(network.sizes[mode] for mode in others), network.sizes[bond])
    full = full.movedim(-1, network.factors[name].index(bond)).contiguous()
    return {key: value for key, value in stored.items() if key != name + ORDER} | {name: full}


def with_identity(free: Tensor, order: Tensor) -> Tensor:
    """Return the rows of an identity and of ``free``, stacked, in the given order."""
    eye = torch.eye(free.shape[1], dtype=free.dtype, device=free.device)
    return torch.cat([eye, free]).index_select(0, order)


def _unfold(factor: Tensor, modes: str, bond: str) -> Tensor:
    return factor.movedim(modes.index(bond), -1).reshape(-1, factor.shape[modes.index(bond)])
