"""What the rules for tiny configs do not know of single families."""

from __future__ import annotations

from typing import Any

CLASSES = {
    "gemma3n_text": "Gemma3nForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "qwen4_exp_text": "Qwen4ExpForCausalLM",
}
"""Text models of families whose towers take other packages, or cannot be made small."""
SPARSE = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8}
SPARSE |= {"indexer_budget": 8, "indexer_compress_ratio": 4}
SPARSE |= {"ngram_vocab_size_base": 64, "split_ngram_parts": 4}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
MROPE = {"text_config": {"rope_parameters": MROPE}}
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4,
             "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 48,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 4},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8},
    "longcat_flash": {"zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "siglip": {"num_labels": 3},
    "siglip2": {"num_labels": 3},
    "swin": {"window_size": 4},
    "swinv2": {"window_size": 4},
    "esm": {"vocab_size": 96, "pad_token_id": 0, "mask_token_id": 3},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "wav2vec2-bert": {"vocab_size": 96, "feature_projection_input_dim": 16},
    "wav2vec2-conformer": {"vocab_size": 96},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": SPARSE,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "layers_block_type": None, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16},
    **dict.fromkeys(
        ("glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl"), MROPE),
}  # fmt: skip
"""Fields of configs, by the family."""
