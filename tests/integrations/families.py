"""Tiny models of families whose files have other names, or other layouts, than their modules."""

from __future__ import annotations

import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "eos_token_id": None, "pad_token_id": None}
PICTURE = {"image_size": 16, "patch_size": 8}
VISION = {**PICTURE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CLIP_TOWER = {"model_type": "clip_vision_model", **VISION}
LLAVA = {
    "text_config": {"model_type": "llama", **GROUPED},
    "vision_config": CLIP_TOWER,
    "image_token_index": 1,
    "vision_feature_layer": -1,
}
QWEN_VL = {
    "text_config": {
        **GROUPED,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    },
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4},
}
GEMMA = {
    "text_config": {**GROUPED, "head_dim": 8},
    "vision_config": {**VISION, "model_type": "siglip_vision_model"},
    "mm_tokens_per_image": 4,
}
FAMILIES = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "tied-llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "nomic_bert": ("NomicBertForMaskedLM", SIZES),
    "bert": ("BertForMaskedLM", SIZES),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**GROUPED, **MOE, "shared_expert_intermediate_size": 48}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48,
                                          "num_layers": 1, "num_heads": 4}),
    "bart": ("BartForConditionalGeneration", {"vocab_size": 64, "d_model": 32, "encoder_layers": 1,
             "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}),
    "llava": ("LlavaForConditionalGeneration", LLAVA),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", QWEN_VL),
    "gemma3": ("Gemma3ForConditionalGeneration", GEMMA),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2Model", {**VISION, "use_swiglu_ffn": True}),
    "clip_vision": ("CLIPVisionModel", VISION),
}  # fmt: skip


def make(family, kind=None):
    """Return a seeded model of a family, in its own class or another."""
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    cls = getattr(transformers, kind or name)
    return cls(getattr(transformers, name).config_class(**sizes)).eval()


def outputs(model):
    """Return what a model makes of a fixed input."""
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(pixel_values=torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16))[0]
        ids = torch.arange(16).reshape(2, 8) + 3
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(input_ids=ids, **decoder)[0]
