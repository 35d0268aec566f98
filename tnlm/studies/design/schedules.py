"""Schedules: which layers to decompose, as published or at regular distances."""

from __future__ import annotations

from collections.abc import Sequence

from tnlm.errors import OptionError
from tnlm.utils.checks import check_whole

PUBLISHED: tuple[tuple[int, ...], ...] = (
    (2, 29),
    (2, 17, 31),
    (2, 8, 14, 20, 26),
    (4, 8, 12, 16, 20, 24, 28),
    (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 31),
    tuple(range(0, 32, 2)),
    (*range(1, 10, 2), *range(10, 19), *range(20, 32, 2)),
    (*range(1, 10, 2), *range(10, 30)),
    (*range(0, 8, 2), *range(8, 32)),
    tuple(range(32)),
)
"""The ten schedules of Llama-2-7B (32 layers) with published accuracies at rank 1.

Source: Moar, Tahmasebi, Pellauer and Kwon 2024, arXiv 2405.06626; the table of accuracies in their
published data.
"""

PUBLISHED_PERCENT = (
    6.004292181671211,
    9.006438272506823,
    15.010730454178034,
    21.015022635849245,
    33.02360699919167,
    48.03433745336969,
    60.042921816712116,
    75.05365227089014,
    84.06009054339695,
    96.06867490673937,
)
"""Percentage of Llama-2-7B's parameters that each schedule removes with all matrices at rank 1."""


def transpose(layers: Sequence[int], *, source: int = 32, target: int) -> tuple[int, ...]:
    """Map a set of layers to a model of another depth.

    The first layer maps to the first and the last to the last; layers between them keep their
    relative position, rounded. In a shallower model several layers may map to one.

    Args:
        layers: layer indices.
        source: depth of the model that the layers belong to.
        target: depth of the other model.

    Raises:
        OptionError: if a layer is not in the first model, or a depth is not a whole number of at
            least 1.

    Example:
        >>> transpose((2, 17, 31), target=30)
        (2, 16, 29)
    """
    check_whole("source", source)
    check_whole("target", target)
    for layer in layers:
        if not 0 <= layer < source:
            raise OptionError(f"layer {layer}; a model of {source} layers has 0 to {source - 1}")
    last = max(source - 1, 1)
    return tuple(sorted({(2 * layer * (target - 1) + last) // (2 * last) for layer in layers}))


def spaced(start: int, distance: int, count: int, *, depth: int) -> tuple[int, ...]:
    """Return ``count`` layers from ``start`` on, ``distance`` apart.

    Args:
        start: the first layer.
        distance: distance between neighbouring layers.
        count: how many layers.
        depth: how many layers the model has.

    Raises:
        OptionError: if the model does not have enough layers, or a number is not a whole one.

    Example:
        >>> spaced(2, 6, 5, depth=32)
        (2, 8, 14, 20, 26)
    """
    check_whole("start", start, 0)
    check_whole("distance", distance)
    check_whole("count", count)
    last = start + distance * (count - 1)
    if last >= depth:
        raise OptionError(
            f"{count} layers from {start}, {distance} apart, end at {last}; the model has layers 0 "
            f"to {depth - 1}"
        )
    return tuple(range(start, last + 1, distance))


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Choose ``count`` layers, evenly spaced.

    Args:
        layers: the layers to choose from, in ascending order.
        count: how many to choose.

    Raises:
        OptionError: if there are not that many.

    Example:
        >>> spread(range(2, 30), 4)
        (5, 12, 19, 26)
    """
    check_whole("count", count, 1, len(layers))
    return tuple(layers[(2 * k + 1) * len(layers) // (2 * count)] for k in range(count))
