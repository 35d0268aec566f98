"""Finds the layers made by tnlm in a model, from its config; fused layers part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

VOCABULARY = ("embedding", "head", "table", "packed-head")
"""Kinds of entries of tables and the heads that share them."""
ROWS = "rows"
"""Kind of entries of experts and routers that lost some of their experts, and are dense."""


@dataclass(frozen=True)
class Made:
    """One layer made by tnlm.

    Attributes:
        name: dotted name; for a part of a fused module, ending with the part's name.
        module: the layer.
        entry: its entry in `config.json`.
        experts: how many experts' layers this one stacks; 0 for an ordinary layer.
    """

    name: str
    module: nn.Module
    entry: Mapping[str, Any]
    experts: int = 0

    @property
    def approximated(self) -> bool:
        """Whether it is compressed, as some parts of a fused module may have stayed dense."""
        return str(self.entry["kind"]) != "dense" or "precision" in self.entry

    @property
    def linear(self) -> bool:
        """Whether it is one linear layer: no embedding or head, no experts and no router."""
        return not self.experts and self.entry["kind"] not in (*VOCABULARY, ROWS)


def made_layers(model: nn.Module) -> Iterator[Made]:
    """Yield the layers made by tnlm in a model; none if it is not compressed.

    Example:
        >>> import tnlm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = tnlm.compress(LlamaForCausalLM(tiny), "svd", progress=False)
        >>> next(made_layers(model)).name
        'model.layers.0.self_attn.q_proj'
    """
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    entries: Mapping[str, Any] = getattr(config, "modules", {})
    for name, entry in entries.items():
        for part in entry.get("parts", [entry]):
            full = name if part is entry else f"{name}.{part['name']}"
            yield Made(full, model.get_submodule(full), part, entry.get("experts", 0))
