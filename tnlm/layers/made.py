"""What tnlm made of a model: the modules that its `config.json` lists, fused ones part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Made:
    """One layer that tnlm put into a model.

    Attributes:
        name: dotted; of a fused module's part, with the part's name at the end.
        module: the layer.
        entry: what `config.json` says of it.
        experts: how many experts have such a layer, stacked in this one; 0 for one of its own.
    """

    name: str
    module: nn.Module
    entry: Mapping[str, Any]
    experts: int = 0

    @property
    def approximated(self) -> bool:
        """Whether it is other than it was: a fused module may have parts that stayed dense."""
        return str(self.entry["kind"]) != "dense"

    @property
    def linear(self) -> bool:
        """Whether it is one linear map: neither of the vocabulary, nor of several experts."""
        return not self.experts and self.entry["kind"] not in ("embedding", "head")


def made_layers(model: nn.Module) -> Iterator[Made]:
    """Yield the layers that tnlm put into a model; none if it is not compressed.

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
