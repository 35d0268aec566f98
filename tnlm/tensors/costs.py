"""What a network of factors costs: parameters, multiply-adds, and the largest useful rank."""

from __future__ import annotations

import dataclasses
from itertools import product

from tnlm.tensors.contraction import chain, pairwise
from tnlm.tensors.network import Network


def macs(network: Network) -> int:
    """Return the multiply-adds per token of the cheapest way to apply a network.

    A table of rows (an embedding, whose row mode may stand in several factors) is priced as the
    rows it builds: the cost of one row.
    """
    return row_macs(network) if is_table(network) else chain(network).macs


def row_macs(network: Network) -> int:
    """Return the multiply-adds to build one row of a table."""
    return pairwise(dataclasses.replace(network, sizes={**network.sizes, network.out: 1})).macs


def is_table(network: Network) -> bool:
    """Tell whether one mode numbers the rows and stands in several factors: only rows are built.

    Where the rows split into several modes, as in a block tensor train, those that several factors
    hold only number blocks, and an activation passes through the factors.
    """
    return len(network.out) == 1 and sum(network.out in m for m in network.factors.values()) > 1


def max_rank(network: Network) -> int:
    """Return the rank that the matrix of a network has for almost all values of its factors.

    It is the smallest cut: however the factors are put on the side of the rows or that of the
    columns, the rank is at most the product of the modes that the two sides share.

    Source: quantum max-flow/min-cut, Cui et al. 2016, arXiv 1508.04644, where equality may fail for
    special sizes; for the formats here it holds.

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
