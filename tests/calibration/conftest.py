"""Tiny models of every modality."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = SIZES | {"vocab_size": 70, "num_key_value_heads": 1}
PLAIN = SIZES | {"vocab_size": 70, "max_position_embeddings": 40, "eos_token_id": 69}
IMAGE = SIZES | {"image_size": 16, "patch_size": 8}
WAVES = SIZES | {
    "vocab_size": 12,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
SIDES = {
    f"{side}_{part}": size
    for side in ("encoder", "decoder")
    for part, size in (("layers", 2), ("ffn_dim", 32), ("attention_heads", 2))
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
WHISPER = SIDES | {
    "d_model": 16,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}


def llava() -> PreTrainedModel:
    vision = IMAGE | {"model_type": "clip_vision_model", "projection_dim": 16}
    text = TEXT | {"model_type": "llama"}
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=69)
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "hidden_size": 16}
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    text = TEXT | {"rope_scaling": rope}
    tokens = {"image_token_id": 69, "vision_start_token_id": 67, "vision_end_token_id": 68}
    config = hf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    return hf.Qwen2VLForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    tokens = {"image_token_index": 69, "boi_token_index": 68, "eoi_token_index": 67}
    text = TEXT | {"head_dim": 8, "sliding_window": 8}
    vision = IMAGE | {"num_hidden_layers": 1}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    )


def clip() -> PreTrainedModel:
    config = hf.CLIPConfig(text_config=PLAIN, vision_config=IMAGE, projection_dim=16)
    return hf.CLIPModel(config)


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=70, decoder_start_token_id=0, **T5)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**IMAGE)),
    "vit-classes": lambda: hf.ViTForImageClassification(hf.ViTConfig(num_labels=3, **IMAGE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**IMAGE)),
    "clip-vision": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE)),
    "clip": clip,
    "wav2vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVES)),
    "wav2vec2-ctc": lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAVES)),
    "wav2vec2-classes": lambda: hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(num_labels=3, **WAVES)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(vocab_size=70, **WHISPER)
    ),
    "llava": llava,
    "qwen2-vl": qwen2_vl,
    "gemma3": gemma3,
}


@pytest.fixture(scope="session")
def make_tiny() -> Callable[[str], PreTrainedModel]:
    """Make a model by its kind; ids 3 to 66 are words."""

    def make(kind: str) -> PreTrainedModel:
        torch.manual_seed(0)
        return MAKERS[kind]().eval()

    return make
