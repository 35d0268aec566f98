from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import tnlm
from tnlm.calibration.capacity import check_batches, positions_of
from tnlm.calibration.data import token_batches
from tnlm.calibration.labels import check_labels
from tnlm.errors import CalibrationError, EvaluationError, ModelError, OptionError
from tnlm.targets.ends import input_table, output_head, vocabulary_of

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 2}
BOTH = {f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "ffn_dim")}
WAVES = {
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
IMAGES = SIZES | {"image_size": 16, "patch_size": 8}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 20}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}

MAKERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, **GPT)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=64, n_positions=32, rotary_dim=4, **GPT)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=32, **SIZES)),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(vocab_size=64, max_position_embeddings=34, pad_token_id=1, **SIZES)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=32,
            **BOTH,
        )
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)),
    "clip": lambda: CLIPModel(
        CLIPConfig(text_config=TEXT, vision_config=IMAGES, projection_dim=16)
    ),
    "vit": lambda: ViTModel(ViTConfig(**IMAGES)),
    "convnext": lambda: ConvNextModel(
        ConvNextConfig(hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1])
    ),
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**SIZES, **WAVES)),
}
WITHOUT_TEXT = ("clip", "vit", "convnext", "wav2vec2")
IDS = torch.arange(256) % 61 + 3


def make(kind):
    torch.manual_seed(0)
    return MAKERS[kind]().eval()


class Quantized(torch.Tensor):
    """A tensor with a class of its own, as torchao makes them."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_subclass(cls, data)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt", "bert", "roberta", "bart"])
def test_the_table_says_how_many_positions_there_are(kind):
    model = make(kind)
    model.train()
    assert positions_of(model) == 32
    assert model.training
    options = {"calibration": IDS, "keep_targets": 0.5, "progress": False}
    before = [tensor.clone() for tensor in model.state_dict().values()]
    with pytest.raises(CalibrationError, match=r"33 tokens.* 32 positions; use max_length<=32"):
        tnlm.compress(model, "svd-llm", max_length=33, **options)
    with pytest.raises(CalibrationError, match="id 64, but the model has 64 tokens"):
        tnlm.compress(model, "svd-llm", **options | {"calibration": [[5, 64]]})
    assert all(map(torch.equal, before, model.state_dict().values()))
    tnlm.compress(model, "svd-llm", max_length=32, **options)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_relative_positions_have_no_table(kind):
    assert positions_of(make(kind)) is None


def test_compressed_tables_are_not_looked_into(tiny_gpt2):
    model = tnlm.compress(tiny_gpt2(), "svd", targets="embeddings", rank=4, progress=False)
    assert positions_of(model) is None
    assert vocabulary_of(model) == 64


def test_the_table_and_not_the_config_counts_tokens(word_tokenizer, word_text, tiny_llama):
    model = tiny_llama()
    model.config.vocab_size = 9
    assert vocabulary_of(model) == 64
    text = [word_text(40)]
    assert tnlm.perplexity(model, text, word_tokenizer, window=8).windows == 5
    smaller = tiny_llama()
    smaller.resize_token_embeddings(40, mean_resizing=False)
    smaller.config.vocab_size = 64
    with pytest.raises(EvaluationError, match="the model has 40 tokens"):
        tnlm.perplexity(smaller, text, word_tokenizer, window=8)


@pytest.mark.parametrize("kind", WITHOUT_TEXT)
def test_models_without_text_are_compressed_without_data_and_refused_with_it(kind):
    model = make(kind)
    with pytest.raises(CalibrationError, match="look at no data, such as svd"):
        tnlm.compress(
            model, "svd-llm", calibration=IDS, max_length=8, keep_targets=0.5, progress=False
        )
    tnlm.compress(model, "svd", keep_targets=0.5, progress=False)
    assert (
        tnlm.report(model).plan.targets_after.params < tnlm.report(model).plan.targets_before.params
    )


@pytest.mark.parametrize("kind", ["clip", "convnext", "wav2vec2"])
def test_they_have_no_table_and_no_head(kind):
    model = make(kind)
    assert input_table(model) is None
    assert output_head(model) is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("missing.txt", "expected batches, got a str of str"),
        ([{"input_ids": torch.tensor([[70]]), "labels": torch.tensor([[70]])}], "id 70"),
        ([{"input_ids": IDS[None], "labels": IDS[None]}], "256 tokens, but the model has 128"),
    ],
)
def test_batches_with_labels_are_checked_too(batch, message, tiny_gpt2):
    with pytest.raises(CalibrationError, match=message):
        check_labels(tiny_gpt2(), batch)


def test_training_and_measuring_have_the_same_limit(word_tokenizer, word_text):
    roberta = make("roberta")
    with pytest.raises(OptionError, match="33, but the model has 32 positions"):
        tnlm.finetune(roberta, IDS, tokenizer=word_tokenizer, max_length=33, progress=False)
    with pytest.raises(EvaluationError, match="window=33, but the model has 32 positions"):
        tnlm.perplexity(make("opt"), [word_text(40)], word_tokenizer, window=33)


def test_check_batches_allows_nothing_and_what_fits():
    model = make("gpt2")
    check_batches(model, [])
    check_batches(model, token_batches(IDS, max_length=32))


@pytest.mark.parametrize("scheme", ["svd", "kron"])
def test_a_tensor_of_another_class_is_refused(scheme, tiny_llama):
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(Quantized(layer.weight.detach()))
    with pytest.raises(ModelError, match="up_proj is a Quantized and no plain tensor"):
        tnlm.compress(model, scheme, keep_targets=0.5, progress=False)
