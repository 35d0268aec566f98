"""Feed-forward layers as targets: hidden channels that several matrices lose together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling, from_dict
from tnlm.layers.arranged import filled
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Finder, Fitted, Read, Target
from tnlm.targets.feed_forward import Layer, feed_forward_layers
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.trial import Slabs
from tnlm.tensors.network import Cost, Factors, Network
from tnlm.tensors.precision import is_half, rounded

logger = logging.getLogger("tnlm")


@dataclass(frozen=True)
class FeedForward(Target):
    """The matrices around a layer of hidden channels, as one target of shape (hidden, out).

    Attributes:
        producers: the targets whose rows are the channels.
        consumer: the target whose columns are the channels.
        slabs: each channel's rows in every producer.
        biases: number of the producers' biases per channel, which are removed with it.
        reason: why channels cannot be removed, or None.
    """

    producers: tuple[MatrixTarget, ...]
    consumer: MatrixTarget
    slabs: tuple[Slabs, ...]
    biases: int = 0
    reason: str | None = None

    kind = "channels"

    @property
    def members(self) -> tuple[MatrixTarget, ...]:
        """All targets, producers first."""
        return (*self.producers, self.consumer)

    @property
    def params(self) -> int:
        """Number of parameters of all matrices."""
        return sum(member.params for member in self.members)

    def weight(self, model: nn.Module) -> Tensor:
        """Return the consumer's weight, transposed: one row per channel."""
        return self.consumer.weight(model).T

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None, since each member keeps its own bias."""
        return None

    @property
    def measured(self) -> Target:
        """The consumer, whose inputs are the channels."""
        return self.consumer

    def metric(self, of: Callable[[Target], Metric]) -> Metric:
        """Weight channels by their second moment, and outputs as in the consumer's metric."""
        measured = of(self.consumer)
        return Metric(measured.inputs, measured.outputs)

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return a statistic of the consumer."""
        return self.consumer.statistic(name, read)

    def saved(self, width: int) -> int:
        """Return how many parameters, biases included, are removed if ``width`` channels stay."""
        channels = self.shape[0] - width
        return channels * (self.params // self.shape[0] + self.biases)

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of all matrices with only the network's channels."""
        width = network.shape[0]
        rest = self.params - self.saved(width)
        work = width * (self.params // self.shape[0])
        return Cost(rest, rest * itemsize, self.met(work))

    def packs(self, structure: str | None) -> bool:
        """Return True: all of it is linear layers."""
        return True

    def packed_shapes(self, network: Network | None) -> Sequence[tuple[int, int]]:
        """Return the shapes of all the matrices with the network's channels alone."""
        channels = self.shape[0]
        width = channels if network is None else network.shape[0]
        producers = [(each.shape[0] * width // channels, each.shape[1]) for each in self.producers]
        return [*producers, (self.consumer.shape[0], width)]

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
        """Choose the channels to keep, and slice all matrices."""
        whole = self.weight(model)
        structure = get_format(str(layer.format))
        spec = from_dict(structure.spec, layer.spec)
        with torch.no_grad():
            factors = structure.fit(whole, metric, spec)
            rows = rounded(factors["rows"], whole.dtype, f"the weight of {self.consumer.name}")
            seen = factors | ({"rows": rows.double()} if is_half(whole.dtype) else {})
            error = metric.relative(whole, structure.reconstruct(self.shape, spec, seen))
        kept = {self.consumer.name: factors["kept"]}
        return Fitted(sliced(self, model, factors), error, columns=kept)


def pairs(model: nn.Module, targets: Sequence[Target]) -> list[FeedForward]:
    """Return the feed-forward layers whose matrices are all targets.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_inner=8, n_layer=1, n_head=1))
        >>> up = MatrixTarget("h.0.mlp.c_fc", "h.0.mlp.c_fc", (8, 4))
        >>> down = MatrixTarget("h.0.mlp.c_proj", "h.0.mlp.c_proj", (4, 8))
        >>> [(pair.shape, pair.params) for pair in pairs(model, [up, down])]
        [((8, 4), 64)]
    """
    held: dict[str, list[MatrixTarget]] = {}
    for target in targets:
        if isinstance(target, MatrixTarget):
            held.setdefault(target.module, []).append(target)
    found = (_pair(model, layer, held) for layer in feed_forward_layers(model))
    return [pair for pair in found if pair is not None]


def _pair(
    model: nn.Module, layer: Layer, held: Mapping[str, Sequence[MatrixTarget]]
) -> FeedForward | None:
    """Return a layer as a target, or None unless all its matrices are targets."""
    producers: list[MatrixTarget] = []
    slabs: list[Slabs] = []
    for name, whole in zip(layer.producers, layer.hidden.producers.values(), strict=True):
        parts = held.get(name, ())
        if sum(part.shape[0] for part in parts) != whole.each * layer.hidden.count:
            return None
        producers += parts
        slabs += [whole] if len(parts) == 1 else [Slabs()] * len(parts)
    readers = held.get(layer.reader, ())
    if len(readers) != 1:
        return None
    (consumer,) = readers
    return FeedForward(
        "+".join(member.name for member in (*producers, consumer)),
        consumer.module,
        (consumer.shape[1], consumer.shape[0]),
        producers=tuple(producers),
        consumer=consumer,
        slabs=tuple(slabs),
        share=consumer.share,
        biases=sum(
            each.each
            for producer, each in zip(producers, slabs, strict=True)
            if producer.bias(model) is not None
        ),
        reason=layer.reason,
    )


def narrowable(model: nn.Module, found: Sequence[FeedForward]) -> list[FeedForward]:
    """Return the layers whose channels can be removed, and warn about the others.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tnlm.targets.selection import select
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=1))
        >>> len(narrowable(model, pairs(model, select(model).targets)))
        2
    """
    against = [pair for pair in found if pair.reason is not None]
    if against:
        logger.warning(
            "%d of %d feed-forward layers keep all their channels, and their matrices are taken "
            "one by one; %s: %s",
            len(against),
            len(found),
            against[0].name,
            against[0].reason,
        )
    return [pair for pair in found if pair.reason is None]


def sliced(
    unit: FeedForward, model: nn.Module, factors: Factors
) -> list[tuple[MatrixTarget, Entry, nn.Module]]:
    """Return every member with its new entry and module."""
    kept = factors["kept"]
    found: list[tuple[MatrixTarget, Entry, nn.Module]] = []
    for member, slabs in zip(unit.producers, unit.slabs, strict=True):
        bias, rows = member.bias(model), slabs.rows(kept, unit.shape[0])
        module = filled(member.weight(model)[rows], None if bias is None else bias[rows])
        parts = {"slabs": slabs.parts} if slabs.parts > 1 else {}
        found.append((member, _entry(member, module, "rows") | parts, module))
    like, bias = unit.consumer.weight(model), unit.consumer.bias(model)
    module = filled(factors["rows"].T.to(like), None if bias is None else bias)
    found.append((unit.consumer, _entry(unit.consumer, module, "columns"), module))
    return found


def _entry(member: MatrixTarget, module: nn.Linear, cut: str) -> Entry:
    shape: list[Any] = [module.out_features, module.in_features]
    return {
        "kind": "sliced",
        "shape": shape,
        "full": list(member.shape),
        "cut": cut,
        "bias": module.bias is not None,
    }


FINDER = Finder("channels", pairs, narrowable)
