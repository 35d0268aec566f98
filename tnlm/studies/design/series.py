"""Series of configurations for a sweep, in which one thing varies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tnlm.studies.design.configuration import Configuration
from tnlm.studies.design.schedules import PUBLISHED, spaced, spread, transpose
from tnlm.studies.design.space import DesignSpace


def by_layer(space: DesignSpace, rank: int | None = None) -> Iterator[Configuration]:
    """Yield each layer alone, with all its matrices: how sensitive is each layer?

    Args:
        space: the design space.
        rank: the rank of all matrices; the first of the space if None.

    Example:
        >>> from transformers import LlamaConfig
        >>> space = DesignSpace(LlamaConfig(), tensors=["q_proj"])
        >>> print(next(by_layer(space)))
        layers 0: q_proj, tucker of rank 1
    """
    for layer in space.layers:
        yield space.all_tensors([layer], rank)


def by_tensor(
    space: DesignSpace, layers: Sequence[int] | None = None, rank: int | None = None
) -> Iterator[Configuration]:
    """Yield each matrix alone, in all layers or in those given: how sensitive is each matrix?"""
    whole = space.all_tensors(space.layers if layers is None else layers, rank)
    for name in space.tensors:
        yield Configuration(whole.layers, (name,), whole.rank, whole.format)


def by_matrix(space: DesignSpace, rank: int | None = None) -> Iterator[Configuration]:
    """Yield each matrix of each layer alone."""
    for layer in space.layers:
        yield from by_tensor(space, [layer], rank)


def by_rank(space: DesignSpace, layers: Sequence[int]) -> Iterator[Configuration]:
    """Yield the given layers, with all their matrices, at every rank of the space."""
    for rank in space.ranks:
        yield space.all_tensors(layers, rank)


def by_distance(
    space: DesignSpace, distances: Sequence[int], *, start: int = 2, count: int = 5
) -> Iterator[Configuration]:
    """Yield ``count`` layers from ``start`` on, at each of several distances.

    The paper uses five layers from layer 2 on, at distances 6 to 1.

    Args:
        space: the design space.
        distances: distances between neighbouring layers.
        start: the first layer.
        count: how many layers.

    Raises:
        OptionError: if the model does not have enough layers.

    Example:
        >>> from transformers import LlamaConfig
        >>> [c.layers for c in by_distance(DesignSpace(LlamaConfig()), [6, 1])]
        [(2, 8, 14, 20, 26), (2, 3, 4, 5, 6)]
    """
    for distance in distances:
        yield space.all_tensors(spaced(start, distance, count, depth=space.depth))


def by_count(space: DesignSpace, counts: Sequence[int]) -> Iterator[Configuration]:
    """Yield evenly spaced layers of the space, for each number of layers.

    Raises:
        OptionError: if the space does not have that many.

    Example:
        >>> from transformers import LlamaConfig
        >>> [c.layers for c in by_count(DesignSpace(LlamaConfig()), [1, 4])]
        [(16,), (4, 12, 20, 28)]
    """
    for count in counts:
        yield space.all_tensors(spread(space.layers, count))


def published(space: DesignSpace, rank: int | None = None) -> Iterator[Configuration]:
    """Yield the ten published schedules, mapped to the model's depth, with all matrices.

    Source: Moar, Tahmasebi, Pellauer and Kwon 2024, arXiv 2405.06626.

    Example:
        >>> from transformers import LlamaConfig
        >>> [c.layers for c in published(DesignSpace(LlamaConfig(num_hidden_layers=30)))][:2]
        [(2, 27), (2, 16, 29)]
    """
    for layers in PUBLISHED:
        yield space.all_tensors(transpose(layers, target=space.depth), rank)
