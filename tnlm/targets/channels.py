"""Feed-forward pairs: hidden channels that several matrices lose together."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
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
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.trial import Hidden, objection
from tnlm.tensors.network import Cost, Factors, Network
from tnlm.tensors.precision import is_half, rounded

logger = logging.getLogger("tnlm")

PAIRS = (
    (("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM
    (("c_fc",), "c_proj"),  # GPT-2
    (("fc1",), "fc2"),  # OPT, Phi
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Bloom, Falcon
    (("fc_in",), "fc_out"),  # GPT-J
    (("wi_0", "wi_1"), "wo"),  # T5 v1.1
    (("wi",), "wo"),  # T5
)
"""Names of the matrices that produce hidden channels, and of the one that reads them."""


@dataclass(frozen=True)
class FeedForward(Target):
    """The matrices around one layer of hidden channels, as one target of shape (hidden, out).

    Attributes:
        producers: the targets whose rows are the channels.
        consumer: the target whose columns are the channels.
        biases: how many producers have a bias, which loses channels as well.
    """

    producers: tuple[MatrixTarget, ...]
    consumer: MatrixTarget
    biases: int = 0

    kind = "channels"

    @property
    def members(self) -> tuple[MatrixTarget, ...]:
        """All the targets, producers first."""
        return (*self.producers, self.consumer)

    @property
    def params(self) -> int:
        """Parameters of all the matrices."""
        return sum(member.params for member in self.members)

    def weight(self, model: nn.Module) -> Tensor:
        """Return the consumer's weight, transposed: a row for every channel."""
        return self.consumer.weight(model).T

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None: each member keeps its own bias."""
        return None

    @property
    def measured(self) -> Target:
        """The consumer, whose inputs are the channels."""
        return self.consumer

    def metric(self, measured: Metric) -> Metric:
        """Weigh channels by their second moment, and outputs as the consumer's metric does."""
        return Metric(measured.inputs, measured.outputs)

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return a statistic of the consumer."""
        return self.consumer.statistic(name, read)

    def saved(self, width: int) -> int:
        """Return how many parameters go when only ``width`` channels stay, biases included."""
        channels = self.shape[0] - width
        return channels * (self.params // self.shape[0] + self.biases)

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of all the matrices with the network's channels alone."""
        width = network.shape[0]
        rest = self.params - self.saved(width)
        work = width * (self.params // self.shape[0])
        return Cost(rest, rest * itemsize, self.met(work))

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the most channels, counted in rows of the matrix that reads them."""
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
        """Choose the channels that stay, and cut all the matrices."""
        whole = self.weight(model)
        structure = get_format(str(layer.format))
        spec = from_dict(structure.spec, layer.spec)
        with torch.no_grad():
            factors = structure.fit(whole, metric, spec)
            rows = rounded(factors["rows"], whole.dtype, f"the weight of {self.consumer.name}")
            seen = factors | ({"rows": rows.double()} if is_half(whole.dtype) else {})
            error = metric.relative(whole, structure.reconstruct(self.shape, spec, seen))
        return Fitted(sliced(self, model, factors), error)


def pairs(model: nn.Module, targets: Sequence[Target]) -> list[FeedForward]:
    """Return the feed-forward pairs all of whose matrices are targets.

    Example:
        >>> up = MatrixTarget("h.0.mlp.c_fc", "h.0.mlp.c_fc", (8, 4))
        >>> down = MatrixTarget("h.0.mlp.c_proj", "h.0.mlp.c_proj", (4, 8))
        >>> layer = nn.ModuleDict({"c_fc": nn.Linear(4, 8), "c_proj": nn.Linear(8, 4)})
        >>> model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"mlp": layer})])})
        >>> [(pair.shape, pair.params) for pair in pairs(model, [up, down])]
        [((8, 4), 64)]
    """
    found = []
    by_name = {t.name: t for t in targets if isinstance(t, MatrixTarget)}
    for target in targets:
        parent, _, ending = target.name.rpartition(".")
        for producers, consumer in PAIRS:
            names = [f"{parent}.{name}" for name in (*producers, consumer)]
            if ending != producers[0] or not all(name in by_name for name in names):
                continue
            members = [by_name[name] for name in names]
            fits = all(member.shape[0] == members[-1].shape[1] for member in members[:-1])
            if fits and not _in_between(model.get_submodule(parent), members):
                found.append(_pair(model, members))
    return found


def _in_between(parent: nn.Module, members: Sequence[MatrixTarget]) -> bool:
    """Tell whether something else has as many channels, as the norm in BitNet's layer."""
    own = {member.module.rpartition(".")[2] for member in members}
    others = (p for name, p in parent.named_parameters() if name.rpartition(".")[0] not in own)
    return any(members[-1].shape[1] in parameter.shape for parameter in others)


def narrowable(model: nn.Module, found: Sequence[FeedForward]) -> list[FeedForward]:
    """Return the pairs that may lose channels, by trial; a warning names the first of the others.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from tnlm.targets.selection import select
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=2, n_head=1))
        >>> len(narrowable(model, pairs(model, select(model).targets)))
        2
    """
    reasons = {pair.name: _objection(model, pair) for pair in found}
    against = {name: reason for name, reason in reasons.items() if reason is not None}
    if against:
        name, reason = next(iter(against.items()))
        logger.warning(
            "%d of %d feed-forward layers keep all their channels, and their matrices are taken "
            "one by one; %s: %s",
            len(against),
            len(found),
            name,
            reason,
        )
    return [pair for pair in found if pair.name not in against]


def _objection(model: nn.Module, pair: FeedForward) -> str | None:
    parent = pair.consumer.module.rpartition(".")[0]
    cut = len(parent) + 1 if parent else 0
    producers = {member.module[cut:]: 1 for member in pair.producers}
    hidden = Hidden(producers, pair.consumer.module[cut:], size=1, count=pair.shape[0])
    return objection(model.get_submodule(parent), hidden)


def _pair(model: nn.Module, members: list[MatrixTarget]) -> FeedForward:
    *producers, consumer = members
    return FeedForward(
        "+".join(member.name for member in members),
        consumer.module,
        (consumer.shape[1], consumer.shape[0]),
        producers=tuple(producers),
        consumer=consumer,
        share=consumer.share,
        biases=sum(producer.bias(model) is not None for producer in producers),
    )


def sliced(
    unit: FeedForward, model: nn.Module, factors: Factors
) -> list[tuple[MatrixTarget, Entry, nn.Module]]:
    """Return every member with the entry and the module that replace it."""
    kept = factors["kept"]
    found: list[tuple[MatrixTarget, Entry, nn.Module]] = []
    for member in unit.producers:
        bias = member.bias(model)
        rows = None if bias is None else bias[kept]
        module = filled(member.weight(model)[kept], rows)
        found.append((member, _entry(member, module, "rows"), module))
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
