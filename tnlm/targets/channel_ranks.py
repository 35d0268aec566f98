"""Feed-forward layers as targets that lose hidden channels and become low rank at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry, network_of
from tnlm.decompositions.base import Ceiling, from_dict, matrix_shape
from tnlm.decompositions.channel_layer import Layer
from tnlm.decompositions.channel_ranks import ChannelRanksSpec
from tnlm.decompositions.low_rank import FORMAT as LOW_RANK
from tnlm.layers.arranged import filled
from tnlm.layers.unfolded import unfolded
from tnlm.metrics.metric import Metric
from tnlm.metrics.stacked import Stacked
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Finder, Fitted, Target
from tnlm.targets.channels import FeedForward, narrowable, pairs
from tnlm.targets.fit import fit_matrix
from tnlm.targets.matrix import MatrixTarget, share_of
from tnlm.targets.narrowed import sliced_entry
from tnlm.targets.trial import Slabs
from tnlm.tensors.contraction import chain, stored_shapes
from tnlm.tensors.costs import macs
from tnlm.tensors.network import Cost, Network
from tnlm.tensors.precision import is_half, rounded


class RankedFeedForward(FeedForward):
    """A feed-forward layer as one tall matrix ``(sizes, hidden)``.

    The matrix that reads the channels stands above the transposed ones that produce them.
    """

    kind = "channel-ranks"
    adds_up = True

    @classmethod
    def of(cls, layer: FeedForward) -> Self:
        """Return the same layer as a tall matrix."""
        hidden, out = layer.shape
        tall = out + sum(producer.shape[1] for producer in layer.producers)
        values = {item.name: getattr(layer, item.name) for item in fields(layer)}
        return cls(**{**values, "shape": (tall, hidden)})

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rows of each matrix in the tall one."""
        return self.consumer.shape[0], *(each.shape[1] for each in self.producers)

    @property
    def fixed(self) -> Mapping[str, Any]:
        """The rows of each matrix."""
        return {"sizes": self.sizes}

    @property
    def count(self) -> int:
        """Number of channels."""
        return self.shape[1]

    @property
    def most(self) -> int:
        """Most parameters of a replacement: fewer than the matrices."""
        return self.params - 1

    def weight(self, model: nn.Module) -> Tensor:
        """Return the tall matrix."""
        turned = [producer.weight(model).T for producer in self.producers]
        return torch.cat([self.consumer.weight(model), *turned])

    def metric(self, of: Callable[[Target], Metric]) -> Metric:
        """Measure the error of each matrix in its own metric."""
        measured = [of(each) for each in self.producers]
        turned = [Metric(each.inputs, each.outputs) for each in measured]
        return Stacked([of(self.consumer), *turned], self.sizes)

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of all matrices, less the biases of dropped channels."""
        each = network.together
        lost = self.biases * (self.count - network.shape[1])
        params = sum(one.params for one in each) - lost
        size = params * itemsize + sum(one.index_bytes for one in each)
        return Cost(params, size, self.met(sum(macs(one) for one in each)))

    def packed_shapes(self, network: Network | None) -> Sequence[tuple[int, int]]:
        """Return the shapes in which the matrices or their factors are stored."""
        if network is None:
            return [member.shape for member in self.members]
        each = [stored_shapes(one, chain(one).steps).values() for one in network.together]
        return [shape for shapes in each for shape in shapes]

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return what the matrices apply."""
        if network is None:
            return [member.shape for member in self.members]
        return [one.shape if _is_whole(one) else one for one in network.together]

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest cost of all matrices together."""
        return share_of(self, keep, max_macs, unit, extra)

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Choose the channels to keep, slice all matrices, and store each in its rank."""
        spec: ChannelRanksSpec = from_dict(ChannelRanksSpec, layer.spec)
        with torch.no_grad():
            whole = Layer.of(self.weight(model), metric, self.sizes)
            kept, lost = whole.kept(spec.width), whole.left(spec.width)
            pieces, metrics = [], {}
            for index, (part, measured) in enumerate(whole.narrowed(kept)):
                piece, error = self._piece(model, layer, spec, kept, index, part, measured)
                pieces.append(piece)
                metrics[piece[0].name] = measured
                lost += error**2
        columns, error = {self.consumer.name: kept}, whole.relative(lost)
        ordered = [*pieces[1:], pieces[0]]
        return Fitted(ordered, error, columns=columns, metrics=metrics, size=whole.size)

    def _piece(
        self,
        model: nn.Module,
        layer: LayerPlan,
        spec: ChannelRanksSpec,
        kept: Tensor,
        index: int,
        part: Tensor,
        metric: Metric,
    ) -> tuple[tuple[MatrixTarget, Entry, nn.Module], float]:
        """Return a narrowed matrix with its entry and module, and its error."""
        member = (self.consumer, *self.producers)[index]
        bias, like = member.bias(model), member.weight(model)
        if bias is not None and index:
            bias = bias[kept]
        entry = sliced_entry(member, part, bias, "rows" if index else "columns")
        rank = spec.ranks[index]
        if rank == min(part.shape):
            stored = rounded(part, like.dtype, f"the weight of {member.name}")
            error = metric.norm(stored.double() - part) if is_half(like.dtype) else 0.0
            return (member, entry, filled(stored, bias)), error
        options = {"rank": rank, "gauge": spec.gauge}
        own = replace(
            layer, name=member.name, shape=matrix_shape(part), format=LOW_RANK.name, spec=options
        )
        entry |= {"kind": "narrowed", "format": own.format, "options": options}
        entry["order"] = list(chain(network_of(entry)).order)
        held = dict(zip(("left", "right"), metric.low_rank(part, rank), strict=True))
        module, error = fit_matrix(entry, part.to(like), bias, metric, own, factors=held)
        return (member, entry, module), error * metric.norm(part)


def _is_whole(network: Network) -> bool:
    return len(network.factors) == 1


def layers(model: nn.Module, targets: Sequence[Target]) -> list[RankedFeedForward]:
    """Return the feed-forward layers whose matrices are all targets, each with a row per channel.

    Experts of a mixture, which need one size for all, are left to other kinds of targets.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_inner=8, n_layer=1, n_head=1))
        >>> up = MatrixTarget("h.0.mlp.c_fc", "h.0.mlp.c_fc", (8, 4))
        >>> down = MatrixTarget("h.0.mlp.c_proj", "h.0.mlp.c_proj", (4, 8))
        >>> [(layer.shape, layer.sizes) for layer in layers(model, [up, down])]
        [((8, 8), (4, 4))]
    """
    experts = tuple(f"{name}." for name, _ in unfolded(model))
    return [
        RankedFeedForward.of(pair)
        for pair in pairs(model, targets)
        if all(slabs == Slabs() for slabs in pair.slabs)
        and not pair.consumer.module.startswith(experts)
    ]


FINDER = Finder("channel-ranks", layers, narrowable)
