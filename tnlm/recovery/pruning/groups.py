"""Dependency groups: rows and columns of a block's matrices that must be removed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tnlm.calibration.blocks import find_blocks
from tnlm.errors import ModelError, OptionError
from tnlm.targets.attention import attentions, heads_of
from tnlm.targets.feed_forward import feed_forward_layers
from tnlm.targets.trial import Hidden, Slabs

HEADS, CHANNELS = "heads", "channels"

WANTED = {
    HEADS: "that takes separate q_proj, k_proj and v_proj, and a config in which head_dim is "
    "independent of hidden_size, as in Llama, Mistral and Qwen but not in GPT-2 and BERT",
    CHANNELS: "that takes a feed-forward layer whose channels are independent",
}


@dataclass(frozen=True)
class Cut:
    """The part of one matrix that belongs to each group.

    Attributes:
        module: dotted name of the module that holds the matrix.
        axis: 0 if groups are rows of the ``(out, in)`` matrix, 1 if they are columns.
        slabs: the rows or columns of each group.
    """

    module: str
    axis: int
    slabs: Slabs


@dataclass(frozen=True)
class Groups:
    """All heads, or all channels, of one block.

    A group of heads is one key/value head with all the query heads that share it.

    Attributes:
        kind: ``"heads"`` or ``"channels"``.
        parent: dotted name of the module that holds the matrices.
        count: number of groups.
        producers: the cuts by rows.
        consumer: the cut by columns; a group whose inputs there are zero has no effect.
    """

    kind: str
    parent: str
    count: int
    producers: tuple[Cut, ...]
    consumer: Cut

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All cuts, producers first."""
        return (*self.producers, self.consumer)

    @property
    def hidden(self) -> Hidden:
        """The values between the producers and the consumer, named within the parent."""
        cut = len(self.parent) + 1
        producers = {producer.module[cut:]: producer.slabs for producer in self.producers}
        return Hidden(producers, self.consumer.module[cut:], self.consumer.slabs.size, self.count)

    def params(self, model: nn.Module) -> int:
        """Return the number of parameters of one group, with its part of the producers' biases."""
        numbers = 0
        for cut in self.cuts:
            module: Any = model.get_submodule(cut.module)
            rows_too = cut.axis == 0 and module.bias is not None
            numbers += module.weight.numel() // self.count + rows_too * cut.slabs.each
        return numbers


def head_width(model: PreTrainedModel) -> int:
    """Return the width of one attention head."""
    config: Any = model.config
    width: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return width


def find_groups(model: PreTrainedModel, names: Sequence[str], kind: str) -> list[Groups]:
    """Return the groups of one kind, one `Groups` per block, in the model's order.

    Args:
        model: a model with a single stack of blocks.
        names: dotted names of the linear modules in blocks that may be cut.
        kind: ``"heads"`` or ``"channels"``.

    Raises:
        OptionError: if the model has no groups of this kind that can be cut.
        ModelError: if a block has none or several, if something else depends on their number, or
            if channels are not independent.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2))
        >>> names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        >>> [heads] = find_groups(model, names, "heads")
        >>> heads.count, [(cut.module[-6:], cut.axis, cut.slabs.size) for cut in heads.cuts]
        (2, [('q_proj', 0, 4), ('k_proj', 0, 2), ('v_proj', 0, 2), ('o_proj', 1, 4)])
    """
    found = list((_heads if kind == HEADS else _channels)(model, names))
    if not found:
        raise OptionError(
            f"{kind}=True, but {type(model).__name__} has no {kind} that can be cut: "
            f"{WANTED[kind]}; use {kind}=False"
        )
    blocks = find_blocks(model, names)
    inside = [[g for g in found if f"{g.parent}.".startswith(f"{block}.")] for block, _ in blocks]
    for (block, _), groups in zip(blocks, inside, strict=True):
        if len(groups) != 1 or groups[0].count != inside[0][0].count:
            raise ModelError(
                f"{block}: every block must have one set of {kind} of the same number, since a "
                f"config has one size for all; found {[g.count for g in groups]}; use {kind}=False"
            )
    return [groups[0] for groups in inside]


def _heads(model: PreTrainedModel, names: Sequence[str]) -> Iterator[Groups]:
    for parent, members in attentions(names):
        hidden = heads_of(model.get_submodule(parent), members, head_width(model))
        if isinstance(hidden, str):
            raise ModelError(f"{parent}: {hidden}; use heads=False")
        slabs = hidden.producers.items()
        cuts = tuple(Cut(f"{parent}.{name}", 0, each) for name, each in slabs)
        reader = Cut(f"{parent}.{hidden.reader}", 1, Slabs(hidden.size))
        yield Groups(HEADS, parent, hidden.count, cuts, reader)


def _channels(model: PreTrainedModel, names: Sequence[str]) -> Iterator[Groups]:
    for layer in feed_forward_layers(model):
        if not set(names).issuperset([*layer.producers, layer.reader]):
            continue
        if layer.reason is not None:
            raise ModelError(
                f"{layer.parent}: channels cannot be cut: {layer.reason}; use channels=False"
            )
        slabs = zip(layer.producers, layer.hidden.producers.values(), strict=True)
        cuts = tuple(Cut(name, 0, each) for name, each in slabs)
        reader = Cut(layer.reader, 1, Slabs())
        yield Groups(CHANNELS, layer.parent, layer.hidden.count, cuts, reader)
