"""Targets whose matrices lose hidden values together: rows of some, columns of another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling, from_dict
from tnlm.layers.arranged import filled
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Fitted, Read, Target
from tnlm.targets.feed_forward import Layer
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.trial import Slabs
from tnlm.tensors.network import Cost, Factors, Network
from tnlm.tensors.precision import is_half, rounded


@dataclass(frozen=True)
class Narrowed(Target):
    """The matrices around hidden values, as one target of shape (hidden, out).

    The hidden values come in equal groups, such as single channels, or all heads that share keys.

    Attributes:
        producers: the targets whose rows make the groups.
        consumer: the target whose columns read them.
        slabs: each group's rows in every producer.
        size: number of adjacent hidden values per group.
        biases: number of the producers' biases per group, which are removed with it.
        reason: why groups cannot be removed, or None.
    """

    producers: tuple[MatrixTarget, ...]
    consumer: MatrixTarget
    slabs: tuple[Slabs, ...]
    size: int = 1
    biases: int = 0
    reason: str | None = None

    @classmethod
    def around(
        cls,
        model: nn.Module,
        layer: Layer,
        producers: Mapping[MatrixTarget, Slabs],
        consumer: MatrixTarget,
    ) -> Self:
        """Return the target of a layer, from its matrices and each group's rows in these."""
        return cls(
            "+".join(member.name for member in (*producers, consumer)),
            consumer.module,
            (consumer.shape[1], consumer.shape[0]),
            producers=tuple(producers),
            consumer=consumer,
            slabs=tuple(producers.values()),
            size=layer.hidden.size,
            biases=sum(
                slabs.each for member, slabs in producers.items() if member.bias(model) is not None
            ),
            reason=layer.reason,
            share=consumer.share,
        )

    @property
    def members(self) -> tuple[MatrixTarget, ...]:
        """All targets, producers first."""
        return (*self.producers, self.consumer)

    @property
    def params(self) -> int:
        """Number of parameters of all matrices."""
        return sum(member.params for member in self.members)

    def weight(self, model: nn.Module) -> Tensor:
        """Return the consumer's weight, transposed: one row per hidden value."""
        return self.consumer.weight(model).T

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None, since each member keeps its own bias."""
        return None

    @property
    def measured(self) -> Target:
        """The consumer, whose inputs are the hidden values."""
        return self.consumer

    def metric(self, of: Callable[[Target], Metric]) -> Metric:
        """Weight hidden values by their second moment, outputs as in the consumer's metric."""
        measured = of(self.consumer)
        return Metric(measured.inputs, measured.outputs)

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return a statistic of the consumer."""
        return self.consumer.statistic(name, read)

    @property
    def count(self) -> int:
        """Number of groups."""
        return self.shape[0] // self.size

    def saved(self, width: int) -> int:
        """Return how many parameters, biases included, are removed if ``width`` values stay."""
        lost = self.count - width // self.size
        return lost * (self.params // self.count + self.biases)

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of all matrices with only the network's hidden values."""
        width = network.shape[0]
        rest = self.params - self.saved(width)
        work = width // self.size * (self.params // self.count)
        return Cost(rest, rest * itemsize, self.met(work))

    def packs(self, structure: str | None) -> bool:
        """Return True: all of it is linear layers."""
        return True

    def packed_shapes(self, network: Network | None) -> Sequence[tuple[int, int]]:
        """Return the shapes of all the matrices with the network's hidden values alone."""
        hidden = self.shape[0]
        width = hidden if network is None else network.shape[0]
        producers = [(each.shape[0] * width // hidden, each.shape[1]) for each in self.producers]
        return [*producers, (self.consumer.shape[0], width)]

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return the shapes of all the matrices."""
        return self.packed_shapes(network)

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest cost, as that of the consumer's kept columns."""
        share = 1.0 if unit == "macs" else keep
        return Ceiling(min(share, max_macs) * math.prod(self.shape) + 1e-9)

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Choose the groups to keep, and slice all matrices."""
        whole = self.weight(model)
        structure = get_format(str(layer.format))
        spec = from_dict(structure.spec, layer.spec)
        with torch.no_grad():
            factors = structure.fit(whole, metric, spec)
            rows = rounded(factors["rows"], whole.dtype, f"the weight of {self.consumer.name}")
            seen = factors | ({"rows": rows.double()} if is_half(whole.dtype) else {})
            error = metric.relative(whole, structure.reconstruct(self.shape, spec, seen))
        reader, kept = self.consumer.name, Slabs(self.size).rows(factors["kept"], self.count)
        hidden = metric.outputs
        left = Metric(metric.inputs, None if hidden is None else hidden.part(kept))
        return Fitted(
            sliced(self, model, factors),
            error,
            columns={reader: kept},
            metrics={reader: left},
            size=metric.norm(whole) ** 2,
        )


def sliced(
    unit: Narrowed, model: nn.Module, factors: Factors
) -> list[tuple[MatrixTarget, Entry, nn.Module]]:
    """Return every member with its new entry and module."""
    kept = factors["kept"]
    found: list[tuple[MatrixTarget, Entry, nn.Module]] = []
    for member, slabs in zip(unit.producers, unit.slabs, strict=True):
        bias, rows = member.bias(model), slabs.rows(kept, unit.count)
        module = filled(member.weight(model)[rows], None if bias is None else bias[rows])
        parts = {"slabs": slabs.parts} if slabs.parts > 1 else {}
        found.append((member, sliced_entry(member, module.weight, bias, "rows") | parts, module))
    like, bias = unit.consumer.weight(model), unit.consumer.bias(model)
    module = filled(factors["rows"].T.to(like), None if bias is None else bias)
    found.append(
        (unit.consumer, sliced_entry(unit.consumer, module.weight, bias, "columns"), module)
    )
    return found


def sliced_entry(member: MatrixTarget, weight: Tensor, bias: Tensor | None, cut: str) -> Entry:
    """Return the entry of a member of which only some rows or columns are left.

    Args:
        member: the target.
        weight: what is left of it.
        bias: its bias, if any.
        cut: ``"rows"`` or ``"columns"``.
    """
    return {
        "kind": "sliced",
        "shape": list(weight.shape),
        "full": list(member.shape),
        "cut": cut,
        "bias": bias is not None,
    }
