"""Tiny models of families whose feed-forward layers and projections are laid out differently."""

from __future__ import annotations

import torch
import transformers

ANY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
SIZES = {**ANY, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 64}  # fmt: skip
FALCON = {**ANY, "ffn_hidden_size": 48}
GEMMA3N = {**ANY, "intermediate_size": 48, "vocab_size_per_layer_input": 64, "head_dim": 8,
           "laurel_rank": 4, "hidden_size_per_layer_input": 8, "num_key_value_heads": 2,
           "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0],
           "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip

PLAIN = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "t5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "relu"}),
    "gated-t5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", BART),
    "bert": ("BertForMaskedLM", SIZES),
    "roberta": ("RobertaForMaskedLM", SIZES),
    "electra": ("ElectraForMaskedLM", SIZES),
    "deberta": ("DebertaV2ForMaskedLM", {**SIZES, "relative_attention": True}),
    "distilbert": ("DistilBertForMaskedLM",
                   {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "vit": ("ViTModel", {**SIZES, "image_size": 16, "patch_size": 8}),
    "mpt": ("MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2,
                               "max_seq_len": 64, "expansion_ratio": 2}),
    "lfm2": ("Lfm2ForCausalLM", {**GROUPED, "layer_types": ["conv", "full_attention"],
                                 "block_auto_adjust_ff_dim": False}),
    "opt": ("OPTForCausalLM", {**ANY, "ffn_dim": 48, "max_position_embeddings": 64,
                               "word_embed_proj_dim": 32}),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
    "gptj": ("GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("FalconForCausalLM", FALCON),
    "nemotron": ("NemotronForCausalLM", GROUPED),  # squared ReLU
}  # fmt: skip
CONCATENATED = {
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "glm4": ("Glm4ForCausalLM", {**GROUPED, "head_dim": 8}),
    "modernbert": ("ModernBertForMaskedLM", {**SIZES, "cls_token_id": 1, "sep_token_id": 2}),
    "granite": ("GraniteMoeSharedForCausalLM",
                {**GROUPED, "shared_intermediate_size": 48, "num_local_experts": 4}),
}  # fmt: skip
MIXED = {
    "bitnet": ("BitNetForCausalLM", GROUPED),  # a norm between
    "gemma3n": ("Gemma3nForCausalLM", GEMMA3N),  # the first layer is sparse: mean and deviation
}
FUSED = {
    "new-falcon": ("FalconForCausalLM",
                   {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "old-falcon": ("FalconForCausalLM", {**FALCON, "multi_query": False, "alibi": True}),
    "codegen": ("CodeGenForCausalLM", {**GPT2, "rotary_dim": 4}),
    "bigcode": ("GPTBigCodeForCausalLM", GPT2),
    "headed-bigcode": ("GPTBigCodeForCausalLM", {**GPT2, "multi_query": False}),
    "persimmon": ("PersimmonForCausalLM", SIZES),
}  # fmt: skip
"""More whose queries, keys and values are one matrix."""
FAMILIES = PLAIN | CONCATENATED | MIXED | FUSED


def make(family, dtype=torch.float32):
    """Return a seeded model of a family."""
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**sizes)).eval().to(dtype)
