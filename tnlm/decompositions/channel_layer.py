"""A feed-forward layer as one tall matrix: what dropped channels leave to be truncated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tnlm.decompositions.channels import ordered
from tnlm.decompositions.nystrom import moment_of, refitted
from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.metrics.stacked import Stacked
from tnlm.tensors.linalg import tails


@dataclass(frozen=True)
class Layer:
    """The matrices of a feed-forward layer with their metrics: the reader first.

    Attributes:
        reader: ``(out, hidden)``, float64.
        producers: each ``(hidden, in)``, float64.
        metrics: of the reader and of the producers.
        size: squared norm of all.
    """

    reader: Tensor
    producers: tuple[Tensor, ...]
    metrics: tuple[Metric, ...]
    size: float

    @classmethod
    def of(cls, weight: Tensor, metric: Metric, sizes: Sequence[int]) -> Layer:
        """Return the layer in a tall matrix.

        Raises:
            OptionError: if the metric is neither that of each matrix nor without any side.
        """
        if type(metric) is Metric and metric.outputs is metric.inputs is None:
            metric = Stacked([metric] * len(sizes), sizes)
        if not isinstance(metric, Stacked) or metric.rows != tuple(sizes):
            raise OptionError("channel-ranks needs the metric of every matrix in the layer")
        reader, *producers = weight.detach().double().split(list(sizes))
        turned = [Metric(each.inputs, each.outputs) for each in metric.members[1:]]
        metrics = (metric.members[0], *turned)
        return cls(reader, tuple(p.T for p in producers), metrics, metric.norm(weight) ** 2)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rows of the reader and the columns of each producer."""
        return len(self.reader), *(each.shape[1] for each in self.producers)

    @property
    def _read(self) -> Metric:
        """The metric of the transposed reader, ``(hidden, out)``."""
        return Metric(self.metrics[0].inputs, self.metrics[0].outputs)

    @cached_property
    def order(self) -> tuple[Tensor, dict[int, float]]:
        """All channels, best first, and the squared error left by some numbers of them."""
        taken, path = ordered(self.reader.T, self._read)
        return taken, dict(path)

    def kept(self, width: int) -> Tensor:
        """Return the sorted indices of the best channels."""
        return self.order[0][:width].sort().values

    def narrowed(self, kept: Tensor) -> Iterator[tuple[Tensor, Metric]]:
        """Yield every matrix with some channels alone, and its metric."""
        rows = refitted(self.reader.T, moment_of(self.reader.T, self._read), kept)
        yield rows.T, Metric(self.metrics[0].outputs, _part(self.metrics[0].inputs, kept))
        for producer, metric in zip(self.producers, self.metrics[1:], strict=True):
            yield producer[kept], Metric(_part(metric.outputs, kept), metric.inputs)

    def left(self, width: int) -> float:
        """Return the squared error of reading only so many channels."""
        known = self.order[1].get(width)
        if known is not None:
            return known
        kept = self.kept(width)  # between two steps of the order
        whole = torch.zeros_like(self.reader)
        whole[:, kept] = next(self.narrowed(kept))[0]
        return self.metrics[0].norm(self.reader - whole) ** 2

    def tails(self, width: int) -> list[Tensor]:
        """Return the squared error of each rank of every matrix of a width."""
        parts = self.narrowed(self.kept(width))
        return [tails(metric.spectrum(part)) for part, metric in parts]

    def relative(self, lost: float) -> float:
        """Return the relative error of a squared error."""
        return math.sqrt(max(lost, 0.0) / self.size) if self.size else 0.0


def _part(side: Side | None, kept: Tensor) -> Side | None:
    return None if side is None else side.part(kept)
