"""Attention as a target: heads that its matrices lose together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tnlm.targets.attention import attention_layers
from tnlm.targets.base import Finder, Target
from tnlm.targets.feed_forward import Layer
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.narrowed import Narrowed

logger = logging.getLogger("tnlm")


class Attention(Narrowed):
    """The matrices around the heads of attention, as one target of shape (hidden, out)."""

    kind = "heads"

    @property
    def fixed(self) -> Mapping[str, Any]:
        """The number of hidden values that belong to a key/value head."""
        return {"size": self.size}


def attentions(model: nn.Module, targets: Sequence[Target]) -> list[Attention]:
    """Return the attention whose matrices are all targets, each whole.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tnlm.targets.selection import select
        >>> model = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2))
        >>> [found] = attentions(model, select(model).targets)
        >>> found.shape, found.size, found.params
        ((8, 8), 4, 192)
    """
    held = {
        target.module: target
        for target in targets
        if isinstance(target, MatrixTarget) and target.layout is None
    }
    return [_attention(model, layer, held) for layer in attention_layers(model, list(held))]


def _attention(model: nn.Module, layer: Layer, held: Mapping[str, MatrixTarget]) -> Attention:
    slabs = layer.hidden.producers.values()
    producers = {held[name]: rows for name, rows in zip(layer.producers, slabs, strict=True)}
    return Attention.around(model, layer, producers, held[layer.reader])


def cuttable(model: nn.Module, found: Sequence[Attention]) -> list[Attention]:
    """Return the attention that can lose heads; the matrices of other attention stay apart."""
    against = [each for each in found if each.reason is not None]
    if against:
        logger.info("%s keeps all its heads: %s", against[0].name, against[0].reason)
    return [each for each in found if each.reason is None]


FINDER = Finder("heads", attentions, cuttable)
