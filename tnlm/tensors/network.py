"""The tensor network that stands for a matrix: named factors, their modes, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

Factors = dict[str, Tensor]
"""Factor name to tensor; the axes of each tensor are the modes that the network names."""


@dataclass(frozen=True)
class Gauge:
    """Where the identity block of a gauge-fixed bond is kept.

    ``factor``, unfolded as (all its other modes, ``bond``), is stored without the rows that
    form an identity, so that ``size(bond)**2`` numbers are never written (see `tnlm.gauge`).
    """

    factor: str
    bond: str


@dataclass(frozen=True)
class Network:
    """A matrix of shape (out, in) as an einsum over named factors.

    Args:
        factors: factor name to its modes, one letter each, e.g. ``{"left": "oa", "right": "ai"}``.
        out: the open modes that make up the rows, outermost first.
        inp: the open modes that make up the columns, outermost first.
        sizes: the size of every mode.
        gauge: the bond that is stored with an identity block, if any.

    A mode stands in two factors (a bond, summed over), or in one factor and ``out`` or ``inp`` (an
    open mode). An open mode may also stand in several factors: it then numbers blocks, which meet
    only their equals. Such is the row of a table, as in a per-token MPS, and such are the modes
    that both factors of a block tensor train share.

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

    @cached_property
    def equation(self) -> str:
        """The einsum equation that rebuilds the matrix, with one axis per open mode."""
        return ",".join(self.factors.values()) + "->" + self.out + self.inp

    @cached_property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the matrix."""
        return self.size(self.out), self.size(self.inp)

    @cached_property
    def params(self) -> int:
        """Numbers stored: all factors, less the identity block of a gauge-fixed bond."""
        saved = self.sizes[self.gauge.bond] ** 2 if self.gauge else 0
        return sum(self.size(modes) for modes in self.factors.values()) - saved

    @property
    def index_bytes(self) -> int:
        """Bytes of the row order that a gauge-fixed factor needs (int64)."""
        return 8 * self.gauge_rows if self.gauge else 0

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
    """What a matrix costs: numbers stored, bytes on disk, multiply-adds per token."""

    params: int
    bytes: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        """Return the sum, field by field."""
        return Cost(self.params + other.params, self.bytes + other.bytes, self.macs + other.macs)
