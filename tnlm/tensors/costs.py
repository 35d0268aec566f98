"""Costs of a tensor network: multiply-adds, and the largest useful rank."""

from __future__ import annotations

import dataclasses
from itertools import product

from tnlm.tensors.contraction import chain, pairwise
from tnlm.tensors.network import Network


def macs(network: Network) -> int:
    """Return the multiply-adds per token of the cheapest way to apply a network.

    The cost of a table (an embedding whose row mode is in several factors) is that of building one
    row.
    """
    return row_macs(network) if is_table(network) else chain(network).macs


def row_macs(network: Network) -> int:
    """Return the multiply-adds to build one row of a table."""
    return pairwise(dataclasses.replace(network, sizes={**network.sizes, network.out: 1})).macs


def is_table(network: Network) -> bool:
    """Return whether a single row mode is in several factors, so that only rows are built.

    If the rows split into several modes, as in a block tensor train, modes in several factors only
    index blocks, and an activation passes through the factors.
    """
    return len(network.out) == 1 and sum(network.out in m for m in network.factors.values()) > 1


def max_rank(network: Network) -> int:
    """Return the rank of a network's matrix for almost all values of its factors.

    It is the minimum cut: for any division of the factors into a row side and a column side, the
    rank is at most the product of the modes that the sides share.

    Source: quantum max-flow/min-cut, Cui et al. 2016, arXiv 1508.04644. Equality may fail for
    special sizes, but holds for the formats here.

    Example:
        >>> max_rank(Network({"left": "or", "right": "ri"}, "o", "i", {"o": 6, "r": 2, "i": 5}))
        2
    """
    factors = list(network.factors.values())
    cuts = []
    for sides in product((True, False), repeat=len(factors)):
        rows, columns = set(network.out), set(network.inp)
        for modes, at_rows in zip(factors, sides, strict=True):
            (rows if at_rows else columns).update(modes)
        cuts.append(network.size("".join(rows & columns)))
    return min(cuts)
