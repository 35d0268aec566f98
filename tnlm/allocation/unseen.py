"""Choosing a spec from shapes alone, where there are no weights whose error could be measured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from tnlm.decompositions.base import Format, Shape, macs
from tnlm.network import Network

NEAR = 0.99
"""Specs with at least this share of the most numbers count as equally large."""


def roomiest(shape: Shape, structure: Format[Any], specs: Sequence[Any]) -> Any:
    """Return the spec that can hold the most: about the most numbers, then the highest rank.

    What is still equal is decided by the fewest multiply-adds. So a low-rank split of a sum of
    Kronecker products gives way to one of as many numbers whose matrix can have full rank.

    Args:
        shape: ``(out, in)``.
        structure: the format.
        specs: what it allows, at least one.

    Example:
        >>> from tnlm.decompositions.kronecker import FORMAT, KroneckerSpec
        >>> low_rank = KroneckerSpec(2, (16, 1), (1, 16))
        >>> square = KroneckerSpec(2, (4, 4), (4, 4))
        >>> roomiest((16, 16), FORMAT, [low_rank, square]) == square
        True
    """
    networks = [structure.network(shape, spec) for spec in specs]
    most = max(network.params for network in networks)
    large = [k for k, network in enumerate(networks) if network.params >= NEAR * most]
    return specs[max(large, key=lambda k: (max_rank(networks[k]), -macs(networks[k])))]


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
