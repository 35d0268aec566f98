"""The tensor network of a matrix: named factors, their modes, and their cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

Factors = dict[str, Tensor]
"""Tensors by factor name; the axes of each are the factor's modes in the network."""


@dataclass(frozen=True)
class Gauge:
    """The place of the identity block of a gauge-fixed bond.

    ``factor``, unfolded as (all its other modes, ``bond``), is stored without the rows that form an
    identity, which saves ``size(bond)**2`` parameters (see `tnlm.tensors.gauge`).
    """

    factor: str
    bond: str


@dataclass(frozen=True)
class Network:
    """A matrix of shape (out, in) as an einsum over named factors.

    Args:
        factors: the modes of each factor, one letter each, e.g. ``{"left": "oa", "right": "ai"}``.
        out: the open modes that make up the rows, outermost first.
        inp: the open modes that make up the columns, outermost first.
        sizes: the size of every mode.
        gauge: the bond that is stored with an identity block, if any.
        indices: row and column numbers stored beside the factors.
        beside: networks of further matrices that one decision replaces together with this one.

    A mode is either a bond, in two factors and summed over, or an open mode, in one factor and in
    ``out`` or ``inp``. An open mode may also be in several factors; it then indexes blocks, and
    each block interacts only with blocks of the same index. Examples are the row of a table, as in
    a per-token MPS, and the modes shared by both factors of a block tensor train.

    Example:
        >>> low_rank = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> low_rank.equation, low_rank.shape, low_rank.params
        ('oa,ai->oi', (6, 5), 22)
    """

    factors: Mapping[str, str]
    out: str
    inp: str
    sizes: Mapping[str, int]
    gauge: Gauge | None = None
    indices: int = 0
    beside: tuple[Network, ...] = ()

    @cached_property
    def equation(self) -> str:
        """The einsum equation of the matrix, with one axis per open mode."""
        return ",".join(self.factors.values()) + "->" + self.out + self.inp

    @property
    def together(self) -> tuple[Network, ...]:
        """This network and those beside it."""
        return (self, *self.beside)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the matrix."""
        return self.size(self.out), self.size(self.inp)

    @cached_property
    def params(self) -> int:
        """Parameters stored: all factors without the identity block of a gauge-fixed bond."""
        saved = self.sizes[self.gauge.bond] ** 2 if self.gauge else 0
        return sum(self.size(modes) for modes in self.factors.values()) - saved

    @property
    def index_bytes(self) -> int:
        """Bytes of indices (int64): the row order of a gauge-fixed factor, and others."""
        return 8 * (self.gauge_rows + self.indices)

    @property
    def gauge_rows(self) -> int:
        """Rows of the gauge-fixed factor, unfolded as (all other modes, bond)."""
        if self.gauge is None:
            return 0
        return self.size(self.factors[self.gauge.factor]) // self.sizes[self.gauge.bond]

    def size(self, modes: str) -> int:
        """Return the product of the sizes of ``modes``."""
        return math.prod(self.sizes[mode] for mode in modes)

    def shape_of(self, factor: str) -> tuple[int, ...]:
        """Return the shape of ``factor``, one axis per mode."""
        return tuple(self.sizes[mode] for mode in self.factors[factor])


@dataclass(frozen=True)
class Cost:
    """The cost of a matrix.

    Attributes:
        params: parameters.
        bytes: bytes on disk.
        macs: multiply-adds per token.
        time: predicted nanoseconds for one pass of a workload; 0 if not predicted.
    """

    params: int
    bytes: int
    macs: int
    time: int = field(default=0, kw_only=True)

    def __add__(self, other: Cost) -> Cost:
        """Return the sum, field by field."""
        return Cost(
            self.params + other.params,
            self.bytes + other.bytes,
            self.macs + other.macs,
            time=self.time + other.time,
        )
