"""Schedules: sets of layers that are decomposed, published ones and regular ones."""

from __future__ import annotations

from collections.abc import Sequence

from tnlm.errors import OptionError

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
"""The ten schedules of Llama-2-7B (32 layers) whose accuracy at rank 1 is published.

Source: Moar, Tahmasebi, Pellauer and Kwon 2024, arXiv 2405.06626; the table of accuracies in the
data that they share.
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
"""Percentage of Llama-2-7B's parameters that each removes with all matrices at rank 1."""


def transpose(layers: Sequence[int], *, source: int = 32, target: int) -> tuple[int, ...]:
    """Move a set of layers to a model of another depth.

    The first layer goes to the first and the last to the last; those between keep their relative
    place, rounded. Going to fewer layers, two may meet and become one.

    Args:
        layers: numbers of layers.
        source: how many layers the first model has.
        target: how many the other has.

    Raises:
        OptionError: for a layer that the first model has not, or a depth below 1.

    Example:
        >>> transpose((2, 17, 31), target=30)
        (2, 16, 29)
    """
    if min(source, target) < 1:
        raise OptionError(f"source={source}, target={target}; allowed: at least 1 layer each")
    for layer in layers:
        if not 0 <= layer < source:
            raise OptionError(f"layer {layer}; a model of {source} layers has 0 to {source - 1}")
    last = max(source - 1, 1)
    return tuple(sorted({(2 * layer * (target - 1) + last) // (2 * last) for layer in layers}))


def spaced(start: int, distance: int, count: int, *, depth: int) -> tuple[int, ...]:
    """Return so many layers from ``start`` on, ``distance`` apart.

    Args:
        start: the first layer.
        distance: from one layer to the next.
        count: how many.
        depth: layers of the model.

    Raises:
        OptionError: if the model has not so many layers.

    Example:
        >>> spaced(2, 6, 5, depth=32)
        (2, 8, 14, 20, 26)
    """
    last = start + distance * (count - 1)
    if start < 0 or min(distance, count) < 1 or last >= depth:
        raise OptionError(
            f"{count} layers from {start}, {distance} apart, end at {last}; "
            f"allowed: layers 0 to {depth - 1}, a distance and a count of at least 1"
        )
    return tuple(range(start, last + 1, distance))


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """Choose so many of some layers, evenly, each in the middle of its share.

    Args:
        layers: what to choose from, in order.
        count: how many.

    Raises:
        OptionError: if there are not so many.

    Example:
        >>> spread(range(2, 30), 4)
        (5, 12, 19, 26)
    """
    if not 1 <= count <= len(layers):
        raise OptionError(f"count={count}; allowed: 1 to {len(layers)}")
    return tuple(layers[(2 * k + 1) * len(layers) // (2 * count)] for k in range(count))
