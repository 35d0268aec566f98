"""Chooses a spec from shapes alone, when there are no weights whose error could be measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnlm.decompositions.base import Format, Shape
from tnlm.tensors.costs import macs, max_rank

NEAR = 0.99
"""Specs with at least this fraction of the most parameters count as equally large."""


def roomiest(shape: Shape, structure: Format[Any], specs: Sequence[Any]) -> Any:
    """Return the most expressive spec: about the most parameters, then the highest rank.

    Ties go to the fewest multiply-adds. For example, among sums of Kronecker products with as many
    parameters, a split that allows full rank is preferred to a low-rank one.

    Args:
        shape: ``(out, in)``.
        structure: the format.
        specs: the specs to choose from, at least one.

    Example:
        >>> from tnlm.decompositions.kronecker import FORMAT, KroneckerSpec
        >>> low_rank = KroneckerSpec(2, (16, 1), (1, 16))
        >>> square = KroneckerSpec(2, (4, 4), (4, 4))
        >>> roomiest((16, 16), FORMAT, [low_rank, square]) == square
        True
    """
    networks = [structure.network(shape, spec) for spec in specs]
    parts = [network.together for network in networks]
    params = [sum(one.params for one in each) for each in parts]
    work = [sum(macs(one) for one in each) for each in parts]
    large = [k for k, count in enumerate(params) if count >= NEAR * max(params)]
    return specs[max(large, key=lambda k: (max_rank(networks[k]), -work[k]))]
