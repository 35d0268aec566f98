"""Feed-forward pairs: hidden channels that several matrices lose together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry
from tnlm.layers.arranged import filled
from tnlm.targets.base import Target
from tnlm.targets.trial import Hidden, objection
from tnlm.tensors.network import Factors

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

    producers: tuple[Target, ...] = ()
    consumer: Target | None = None
    biases: int = 0

    @property
    def params(self) -> int:
        """Numbers in all the matrices."""
        return sum(member.params for member in self.members)

    @property
    def members(self) -> tuple[Target, ...]:
        """All the targets, producers first."""
        return (*self.producers, *([self.consumer] if self.consumer else []))

    def saved(self, width: int) -> int:
        """Return how many numbers go when only ``width`` channels stay, biases included."""
        channels = self.shape[0] - width
        return channels * (self.params // self.shape[0] + self.biases)

    def weight(self, model: nn.Module) -> Tensor:
        """Return the consumer's weight, transposed: a row for every channel."""
        return self.reader.weight(model).T

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None: each member keeps its own bias."""
        return None

    @property
    def reader(self) -> Target:
        """The consumer."""
        if self.consumer is None:
            raise ValueError("a feed-forward target without a consumer")
        return self.consumer


def pairs(model: nn.Module, targets: Sequence[Target]) -> list[FeedForward]:
    """Return the feed-forward pairs all of whose matrices are targets.

    Example:
        >>> up = Target("h.0.mlp.c_fc", "h.0.mlp.c_fc", "linear", (8, 4))
        >>> down = Target("h.0.mlp.c_proj", "h.0.mlp.c_proj", "linear", (4, 8))
        >>> layer = nn.ModuleDict({"c_fc": nn.Linear(4, 8), "c_proj": nn.Linear(8, 4)})
        >>> model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"mlp": layer})])})
        >>> [(pair.shape, pair.params) for pair in pairs(model, [up, down])]
        [((8, 4), 64)]
    """
    found = []
    by_name = {target.name: target for target in targets}
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


def _in_between(parent: nn.Module, members: Sequence[Target]) -> bool:
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
    parent = pair.reader.module.rpartition(".")[0]
    cut = len(parent) + 1 if parent else 0
    producers = {member.module[cut:]: 1 for member in pair.producers}
    hidden = Hidden(producers, pair.reader.module[cut:], size=1, count=pair.shape[0])
    return objection(model.get_submodule(parent), hidden)


def _pair(model: nn.Module, members: list[Target]) -> FeedForward:
    *producers, consumer = members
    return FeedForward(
        "+".join(member.name for member in members),
        consumer.module,
        "channels",
        (consumer.shape[1], consumer.shape[0]),
        share=consumer.share,
        producers=tuple(producers),
        consumer=consumer,
        biases=sum(producer.bias(model) is not None for producer in producers),
    )


def sliced(
    unit: FeedForward, model: nn.Module, factors: Factors
) -> list[tuple[Target, Entry, nn.Module]]:
    """Return every member with the entry and the module that replace it."""
    kept = factors["kept"]
    found: list[tuple[Target, Entry, nn.Module]] = []
    for member in unit.producers:
        bias = member.bias(model)
        rows = None if bias is None else bias[kept]
        module = filled(member.weight(model)[kept], rows)
        found.append((member, _entry(member, module, "rows"), module))
    like, bias = unit.reader.weight(model), unit.reader.bias(model)
    module = filled(factors["rows"].T.to(like), None if bias is None else bias)
    found.append((unit.reader, _entry(unit.reader, module, "columns"), module))
    return found


def _entry(member: Target, module: nn.Linear, cut: str) -> Entry:
    shape: list[Any] = [module.out_features, module.in_features]
    return {
        "kind": "sliced",
        "shape": shape,
        "full": list(member.shape),
        "cut": cut,
        "bias": module.bias is not None,
    }
