"""The names, the layout and the types that llama.cpp wants the weights of a model in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tnlm.errors import ModelError

FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
"""Kinds of models, and llama.cpp's names for them where all blocks have one width."""
ANY_WIDTHS = "deci"
"""llama.cpp's name for the Llama graph with widths and numbers of heads for each block."""
ROTATED = ("q_proj", "k_proj")
"""Matrices whose outputs are rotated by their position."""
PRECISE = "Q8_0"
"""Of the embedding and the head, where matrices have fewer bits."""


def library() -> Any:
    """Return gguf-py.

    Raises:
        ModelError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelError("writing GGUF needs gguf: pip install 'tnlm[gguf]'") from error
    return gguf


def check_family(config: Any) -> None:
    """Raise `ModelError` for a model that has no graph in llama.cpp, or is not known here."""
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"a {config.model_type} cannot be written to GGUF; allowed: {', '.join(FAMILIES)}"
        )
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise ModelError(
            f"rope_type={rope['rope_type']!r} cannot be written to GGUF; allowed: default, linear, "
            "llama3"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act={config.hidden_act!r}; llama.cpp runs this model with silu")


def laid_out(config: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by their names in GGUF files, in the layout of llama.cpp."""
    gguf = library()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    turned = FAMILIES[config.model_type] == "llama" or varies(weights)
    size, found = head_size(config), {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ModelError(f"{name} has no name in GGUF files")
        rotated = turned and name.split(".")[-2] in ROTATED
        found[known] = _interleaved(tensor, len(tensor) // size) if rotated else tensor
    if (config.rope_parameters or {}).get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _llama3(config)
    return found


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Put the two rows of every rotated pair side by side, not half a head apart."""
    rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _llama3(config: Any) -> Tensor:
    """Return the factors by which Llama 3 stretches the wavelengths of its rotations."""
    rope, size = config.rope_parameters, head_size(config)
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, size, 2).double() / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = (rope["original_max_position_embeddings"] / waves - low) / (high - low)
    share = share.clamp(0.0, 1.0)
    factors: Tensor = 1.0 / ((1.0 - share) / rope["factor"] + share)
    return factors.float()


def head_size(config: Any) -> int:
    """Return the size of an attention head."""
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def varies(weights: Mapping[str, Tensor]) -> bool:
    """Return whether blocks differ in the width of a layer."""
    shapes: dict[str, set[torch.Size]] = {}
    for name, tensor in weights.items():
        block, _, part = name.rpartition(".layers.")[2].partition(".")
        if block.isdigit():
            shapes.setdefault(part, set()).add(tensor.shape)
    return any(len(different) > 1 for different in shapes.values())


def type_of(name: str, tensor: Tensor, kind: str) -> str:
    """Return the type of a tensor: rows of quantized ones are cut into groups of 32."""
    if tensor.dim() == 1:
        return "F32"
    if kind in ("F32", "F16", "BF16"):
        return kind
    if tensor.shape[-1] % 32:
        return "F16"
    return PRECISE if name in ("token_embd.weight", "output.weight") else kind
