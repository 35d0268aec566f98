"""Feed-forward layers as targets: hidden channels that several matrices lose together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from tnlm.targets.base import Finder, Target
from tnlm.targets.feed_forward import Layer, feed_forward_layers
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.narrowed import Narrowed
from tnlm.targets.trial import Slabs

logger = logging.getLogger("tnlm")


class FeedForward(Narrowed):
    """The matrices around a layer of hidden channels, as one target of shape (hidden, out)."""

    kind = "channels"
    ends_block = True


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
    producers: dict[MatrixTarget, Slabs] = {}
    for name, whole in zip(layer.producers, layer.hidden.producers.values(), strict=True):
        parts = held.get(name, ())
        if sum(part.shape[0] for part in parts) != whole.each * layer.hidden.count:
            return None
        producers |= dict.fromkeys(parts, whole if len(parts) == 1 else Slabs())
    readers = held.get(layer.reader, ())
    return FeedForward.around(model, layer, producers, readers[0]) if len(readers) == 1 else None


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


FINDER = Finder("channels", pairs, narrowable)
