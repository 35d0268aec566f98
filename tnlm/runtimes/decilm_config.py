"""The configuration of a Llama whose blocks differ in width.

It is copied beside exported weights and read there by other programs, so it imports nothing of
tnlm.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """A Llama's config with ``block_configs``: what attention and feed-forward of each block are.

    Example:
        >>> block = {"attention": {"no_op": False, "n_heads_in_group": 4},
        ...          "ffn": {"no_op": False, "intermediate_size": 96}}
        >>> config = DeciLMConfig(num_hidden_layers=1, block_configs=[block])
        >>> config.block_configs[0].ffn.intermediate_size
        96
        >>> config.to_dict()["block_configs"][0] == block
        True
    """

    model_type = "nemotron-nas"
    _auto_class = "AutoConfig"  # saving copies this file beside config.json

    def __init__(self, block_configs: Any = (), **fields: Any) -> None:
        """Take blocks as dicts; they become objects, which is how models read them."""
        super().__init__(**fields)
        self.block_configs = [
            SimpleNamespace(**{part: SimpleNamespace(**said) for part, said in block.items()})
            for block in block_configs
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields for JSON, rotations also by the names of older programs."""
        fields: dict[str, Any] = super().to_dict()
        fields["block_configs"] = [
            {part: dict(vars(said)) for part, said in vars(block).items()}
            for block in self.block_configs
        ]
        rope = dict(fields.get("rope_parameters") or {})
        if rope:
            fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
            scaled = rope.get("rope_type", "default") != "default"
            fields["rope_scaling"] = rope if scaled else None
        return fields
