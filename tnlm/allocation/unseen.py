"""Choosing a spec from shapes alone, where there are no weights whose error could be measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnlm.decompositions.base import Format, Shape
from tnlm.tensors.costs import macs, max_rank

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
