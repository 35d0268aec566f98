"""llama.cpp: a GGUF file, whose blocks may differ in feed-forward width and number of heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.runtimes.base import Prepared, Runtime
from tnlm.runtimes.gguf_layout import (
    ANY_WIDTHS,
    FAMILIES,
    check_family,
    head_size,
    laid_out,
    library,
    type_of,
    varies,
)
from tnlm.runtimes.gguf_tokens import Tokens, read_tokens
from tnlm.runtimes.weights import plain_weights

logger = logging.getLogger("tnlm")

TYPES = ("F16", "F32", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that gguf-py can write; it has no K-quants."""
FILE_TYPES = {"F32": "ALL_F32"}
"""What gguf-py calls files of a type, where it is not ``MOSTLY_`` and the type."""


def _prepare(model: PreTrainedModel, tokenizer: Any, kind: str) -> Prepared:
    library()
    config: Any = model.config
    check_family(config)
    plain = plain_weights(model)
    family = ANY_WIDTHS if varies(plain) else FAMILIES[config.model_type]
    weights = laid_out(config, plain)
    tokens = None if tokenizer is None else read_tokens(tokenizer, config.vocab_size)
    kinds = {name: type_of(name, tensor, kind) for name, tensor in weights.items()}
    wide = [name for name, tensor in weights.items() if tensor.dim() > 1 and kinds[name] == "F16"]
    if wide and kind not in ("F16", "F32", "BF16"):
        logger.warning(
            "%d matrices are written as F16, as their rows are no multiple of 32: %s; compress "
            "with portable='llama.cpp'",
            len(wide),
            wide[0],
        )

    def write(directory: Path) -> None:
        _write(directory / f"model-{kind}.gguf", family, config, tokens, weights, kinds)

    return Prepared(sum(_bytes(weights[name], kinds[name]) for name in weights), write)


def _heights(config: Any, weights: Mapping[str, Tensor], name: str) -> list[int]:
    """Return the number of rows of a matrix in every block."""
    return [len(weights[f"blk.{block}.{name}.weight"]) for block in range(config.num_hidden_layers)]


def _same(values: list[int]) -> int | list[int]:
    """Return one value where all blocks agree, as fields of ordinary families must be."""
    return values[0] if len(set(values)) == 1 else values


def _bytes(tensor: Tensor, kind: str) -> int:
    gguf = library()
    size, held = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(tensor.numel() // size * held)


def _write(
    path: Path,
    family: str,
    config: Any,
    tokens: Tokens | None,
    weights: Mapping[str, Tensor],
    kinds: Mapping[str, str],
) -> None:
    gguf = library()
    writer = gguf.GGUFWriter(path, family)
    _describe(writer, config, weights, path.stem.rpartition("-")[2])
    if tokens is not None:
        _tokens(writer, tokens)
    for name, tensor in weights.items():
        kind = gguf.GGMLQuantizationType[kinds[name]]
        values = gguf.quants.quantize(_finite(name, tensor, kinds[name]), kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _finite(name: str, tensor: Tensor, kind: str) -> Any:
    values = tensor.detach().float().cpu()
    if kind == "F16" and not bool(values.half().isfinite().all()):
        raise ModelError(f"a value of {name} is too large for F16; use type='BF16' or 'F32'")
    return values.numpy()


def _describe(writer: Any, config: Any, weights: Mapping[str, Tensor], kind: str) -> None:
    """Write the fields that fix the graph."""
    gguf, size = library(), head_size(config)
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    rope = config.rope_parameters or {}
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(min(window, config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(_same(_heights(config, weights, "ffn_gate")))
    writer.add_head_count(_same([rows // size for rows in _heights(config, weights, "attn_q")]))
    writer.add_head_count_kv(_same([rows // size for rows in _heights(config, weights, "attn_k")]))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _tokens(writer: Any, tokens: Tokens) -> None:
    """Write the tokenizer and its chat template."""
    writer.add_tokenizer_model(tokens.model)
    if tokens.split:
        writer.add_tokenizer_pre(tokens.split)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
        writer.add_add_space_prefix(tokens.add_space)
    for role, number in tokens.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(tokens.add_bos)
    if tokens.chat_template:
        writer.add_chat_template(tokens.chat_template)


RUNTIME = Runtime(
    name="llama.cpp",
    title="GGUF files, whose blocks differ in feed-forward width and number of heads",
    to="gguf",
    types=TYPES,
    formats=("channels", "heads"),
    multiple=32,
    prepare=_prepare,
)
