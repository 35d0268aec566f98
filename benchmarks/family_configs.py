"""Tiny models of every family: default configs of transformers made small by fields' names."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from family_exceptions import CLASSES, FIELDS
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.pytorch_utils import Conv1D

TASKS = {
    "SPEECH_SEQ_2_SEQ": "AutoModelForSpeechSeq2Seq",
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "MASKED_LM": "AutoModelForMaskedLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "CTC": "AutoModelForCTC",
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "AUDIO_CLASSIFICATION": "AutoModelForAudioClassification",
    "VIDEO_CLASSIFICATION": "AutoModelForVideoClassification",
    "": "AutoModel",
}
"""Tasks and their Auto classes; a family is built for the first that it supports."""
VOCABULARY, WIDTH, INNER, LAYERS, HEADS, EXPERTS, RANK = 96, 32, 48, 2, 4, 4, 16
HEAD = WIDTH // HEADS
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Fields that say how long the lists are which describe every layer."""
LARGEST = 3_000_000
"""Parameters of a model that is still tiny."""
FIRST_WORD = 48
"""Ids below it may have a meaning of their own, as those of images."""
RULES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_per_layer_input)?|n_positions|n_ctx|context_length", VOCABULARY),
    (r"(.*_)?max_((source|target)_)?position(s|_embeddings)|max_seq_len|max_length", VOCABULARY),
    (r"moe_intermediate_size|.*expert.*intermediate_size|shared_intermediate_size", 24),
    (r"(.*_)?(intermediate_size|ffn_dim|mlp_dim)(_mlp)?|d_ff|n_inner|dff|dim_ff", INNER),
    (r"(.*_)?(ffn_hidden_size|linear_units|feedforward(_dim)?|d_inner)", INNER),
    (r"(.*_)?(key_value|kv|query_group)_(heads|groups)|n_head_kv", HEADS // 2),
    (r"(.*_)?(num|attention|attn|index_n|conf_num)_heads?|n_heads?", HEADS),
    (r"mamba_n_heads", 2 * HEADS),
    (r"linear_num_.*_heads|mamba_num_heads|linear_num_heads|rotary_dim", HEADS),
    (r"(.*_)?rank|index_head_dim", RANK),
    (r"qk_head_dim", 2 * HEAD),
    (r"(.*_)?head_dim|d_kv|d_head|kv_channels|dim_head|mamba_d_head", HEAD),
    (r"(n_routed|num|num_local|moe_num|n)_experts", EXPERTS),
    (r"first_k_dense_replace|num_(dense|sparse_encoder|sparse_decoder)_layers", 1),
    (r"(encoder|decoder)_sparse_step", 2),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|num_selected_experts)", 2),
    (r"(n|num|topk|num_expert|num_limited|mamba_n|n_expert)_groups?", 1),
    (r"(.*_)?num_(hidden_|encoder_|decoder_)?(layers|blocks)|n_layers?|depth|layers", LAYERS),
    (r"(encoder|decoder)_(num_)?(hidden_)?layers|num_encoder_blocks", LAYERS),
    (r"(.*_)?(hidden_size|hidden_dim|embed_dim|embedding_dim|embedding_size)", WIDTH),
    (r"d_model|n_embd|d_embed|emb_dim|dim|out_hidden_size|(.*_)?proj(ection)?_(dim|size)", WIDTH),
    (r"pooler_output_size|classifier_proj_size|adapter_\w+_dim|adapter_input_size", WIDTH),
    (r"(.*_)?image_size|input_size|crop_size|img_size", 32),
    (r"patch_size", 8),
    (r"num_mel_bins|num_mel_features|input_feat_per_channel|feature_size|input_feat_size", 16),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention", 16),
    (r"(mamba_|ssm_)?(chunk_size|block_length)|state_size|mamba_d_state|ssm_state_size", 8),
)
"""Sizes by the names of fields; the first that fits in full decides."""
LISTS: tuple[tuple[str, int], ...] = (
    (r"depths|stage_num_blocks|layers_per_block|block_repeats|stage_numb_of_layers", 1),
    (r"(.*_)?(hidden_sizes|embed_dims?|channels?|conv_dim|dims|dim|sizes)", 16),
    (r"(.*_)?(heads|num_attention_heads|num_heads)", 2),
)
"""Sizes of fields that are lists of numbers."""


def families() -> dict[str, str]:
    """Return the class that each family is tried in, by its model type."""
    found: dict[str, str] = {}
    for task in TASKS:
        for kind, value in _mapping(task).items():
            found.setdefault(kind, value if isinstance(value, str) else value[0])
    whole = {kind: name for kind, name in found.items() if not _is_part(kind, found)}
    return whole | CLASSES


def _is_part(kind: str, kinds: Iterable[str]) -> bool:
    """Whether a model type is a tower or the text model of another, in whose folder it stands."""
    folder = model_type_to_module_name(kind)
    return folder != kind.replace("-", "_") and folder in kinds


def _mapping(task: str) -> Mapping[str, Any]:
    name = f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES"
    found: Mapping[str, Any] = getattr(modeling_auto, name)
    return found


def auto_class(model: PreTrainedModel) -> Any:
    """Return the Auto class that loads a model's class by its config, or that class itself."""
    for auto in TASKS.values():
        mapping: Mapping[Any, Any] = getattr(transformers, auto)._model_mapping
        found = mapping.get(type(model.config), ())
        if type(model) in (found if isinstance(found, tuple) else (found,))[:1]:
            return getattr(transformers, auto)
    return type(model)


def tiny_model(kind: str) -> PreTrainedModel:
    """Return a seeded model of a family.

    Raises:
        ValueError: if it is not tiny, as the rules do not know its fields.
    """
    cls = getattr(transformers, families()[kind])
    config = tiny_config(kind, cls.config_class)
    with torch.device("meta"):
        params = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if params > LARGEST:
        raise ValueError(f"the rules leave {params:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = cls(config)
    for module in model.modules():  # small as they are made, they would leave outputs near zero
        if isinstance(module, nn.Linear | Conv1D | nn.modules.conv._ConvNd):
            outputs = max(module.weight.shape[isinstance(module, Conv1D)], 1)
            inputs = max(module.weight.numel() // outputs, 1)
            nn.init.normal_(module.weight, std=inputs**-0.5)
    return model.eval()


def tiny_config(kind: str, cls: type[PreTrainedConfig] | None = None) -> PreTrainedConfig:
    """Return the default config of a family with all sizes made small."""
    made = CONFIG_MAPPING[kind] if cls is None else cls
    return made(**_merged(shrunk(made().to_dict()), FIELDS.get(kind, {})))


def shrunk(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that have to change, with small values."""
    kept = _layers(fields)
    small: dict[str, Any] = {}
    for position, (name, value) in enumerate(fields.items()):
        if isinstance(value, Mapping):
            small[name] = _nested(name, value, kept[1])
        elif isinstance(value, list):
            small[name] = _listed(name, value, kept)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _number(name, value, position)
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        small["num_key_value_heads"] = HEADS  # latent attention has no groups
    small |= {
        name: len(kept[1]) for name in LAYER_COUNTS if kept[0] and fields.get(name) == kept[0]
    }
    return {name: value for name, value in small.items() if value != fields[name]}


def _layers(fields: Mapping[str, Any]) -> tuple[int, list[int]]:
    """Return how many layers a config has, and which stay: one of every kind, two at least."""
    counts = (fields.get(name) for name in LAYER_COUNTS)
    count = next((each for each in counts if isinstance(each, int)), 0)
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == count > 1]
    words = [v for v in lists if isinstance(v[0], str | bool)]
    first: dict[tuple[Any, ...], int] = {}
    for layer in range(count):
        first.setdefault(tuple(each[layer] for each in words), layer)
    chosen = list(first.values())
    others = [layer for layer in range(count) if layer not in chosen]
    return count, sorted(chosen + others[: max(LAYERS - len(chosen), 0)])


def _nested(name: str, value: Mapping[Any, Any], layers: Sequence[int]) -> dict[Any, Any]:
    if name == "per_layer_config":
        return {
            str(layers.index(int(key))): item for key, item in value.items() if int(key) in layers
        }
    small = dict(value)
    if "mrope_section" in value:
        half = int(HEAD * value.get("partial_rotary_factor", 1)) // 2
        small["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    if "rope_type" in value or "rope_theta" in value:
        return small
    changed = shrunk(value)
    if "model_type" in value:
        return {"model_type": value["model_type"], **changed}
    return small | changed


def _listed(name: str, value: list[Any], kept: tuple[int, list[int]]) -> list[Any]:
    count, layers = kept
    if count > 1 and len(value) == count:
        value = [value[layer] for layer in layers]
    if value and all(isinstance(item, int) for item in value):
        for pattern, size in LISTS:
            if re.fullmatch(pattern, name):
                return [min(size, item) for item in value]
    return value


def _number(name: str, value: int, position: int) -> int:
    if name.endswith(("_id", "_index")) and not name.startswith("layer"):
        return value if value < 4 else 4 + position % (FIRST_WORD - 4)
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            return min(size, value)
    return value


def _merged(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in others.items():
        inner = merged.get(name)
        nested = isinstance(value, Mapping) and isinstance(inner, Mapping)
        merged[name] = _merged(inner, value) if nested else value  # type: ignore[arg-type]
    return merged
