"""DeciLM: a Llama with a feed-forward width for each block, for vLLM, SGLang and MLX."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.runtimes.base import Prepared, Runtime
from tnlm.runtimes.gguf_layout import head_size
from tnlm.runtimes.weights import generation_config, plain_weights

logger = logging.getLogger("tnlm")

FAMILIES = ("llama", "mistral")
MULTIPLE = 256
"""SGLang and MLX round widths up to it."""
OURS = ("quantization_config", "transformers_weights")
"""Fields of a config that say how tnlm reads a model."""


def _prepare(model: PreTrainedModel, tokenizer: Any, _: str) -> Prepared:
    _check(model)
    generation = generation_config(model)
    weights = plain_weights(model)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    config = _config(model, weights)
    held = {name: tensor.cpu() for name, tensor in weights.items()}

    def write(directory: Path) -> None:
        config.save_pretrained(directory)
        if generation is not None:
            generation.save_pretrained(directory)
        save_torch_state_dict(held, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    return Prepared(sum(t.numel() * t.element_size() for t in held.values()), write)


def _check(model: PreTrainedModel) -> None:
    """Raise `ModelError` for a model that is no Llama by another name."""
    config: Any = model.config
    if config.model_type not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        raise ModelError(
            f"a {config.model_type} ({type(model).__name__}) cannot be written as DeciLM; allowed: "
            f"causal models of {', '.join(FAMILIES)}"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act={config.hidden_act!r}; DeciLM has silu")
    if getattr(config, "sliding_window", None):
        raise ModelError(
            f"sliding_window={config.sliding_window}, which DeciLM does not have; set "
            "model.config.sliding_window = None if texts are shorter"
        )


def _config(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> Any:
    from tnlm.runtimes.decilm_config import DeciLMConfig

    config: Any = model.config
    widths, groups = [], []
    for block in range(config.num_hidden_layers):
        prefix = f"model.layers.{block}"
        widths.append(len(weights[f"{prefix}.mlp.gate_proj.weight"]))
        groups.append(_group(config, prefix, weights))
    fields = {k: v for k, v in config.to_dict().items() if k not in (*OURS, "model_type")}
    fields |= {"architectures": ["DeciLMForCausalLM"], "intermediate_size": max(widths)}
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    return DeciLMConfig(
        block_configs=[
            {"attention": {"no_op": False, "n_heads_in_group": group}, "ffn": width}
            for group, width in zip(groups, _feed_forward(widths, config.hidden_size), strict=True)
        ],
        **fields,
    )


def _group(config: Any, prefix: str, weights: Mapping[str, Tensor]) -> int:
    """Return how many heads of a block share keys and values."""
    size = head_size(config)
    heads, shared = (
        len(weights[f"{prefix}.self_attn.{n}.weight"]) // size for n in ("q_proj", "k_proj")
    )
    if heads != config.num_attention_heads or heads % shared:
        raise ModelError(
            f"{prefix}.self_attn has {heads} heads in {shared} groups, but in DeciLM all blocks "
            f"have {config.num_attention_heads} heads, in equal groups"
        )
    return int(heads // shared)


def _feed_forward(widths: list[int], hidden: int) -> list[dict[str, Any]]:
    """Describe the feed-forward layers, by multiples of the hidden size where all programs can.

    Example:
        >>> _feed_forward([512, 256], 64)
        [{'no_op': False, 'ffn_mult': 12.0}, {'no_op': False, 'ffn_mult': 6.0}]
        >>> _feed_forward([96], 64)
        [{'no_op': False, 'intermediate_size': 96}]
    """
    if not any(width % MULTIPLE for width in widths):
        return [{"no_op": False, "ffn_mult": 1.5 * width / hidden} for width in widths]
    logger.warning(
        "widths are no multiples of %d, so that vLLM reads this model, but SGLang and MLX do not; "
        "compress with portable='decilm'",
        MULTIPLE,
    )
    return [{"no_op": False, "intermediate_size": width} for width in widths]


RUNTIME = Runtime(
    name="decilm",
    title="DeciLM checkpoints for vLLM, SGLang and MLX, with a feed-forward width for each block",
    to="decilm",
    types=("model",),
    formats=("channels",),
    multiple=MULTIPLE,
    prepare=_prepare,
)
