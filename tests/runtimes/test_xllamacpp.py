"""Real llama.cpp runs what is exported; `make test-serving` installs it."""

from __future__ import annotations

import pytest
import torch

import tnlm

xllamacpp = pytest.importorskip("xllamacpp")


def greedy(path, prompt, count):
    """Return the text that llama.cpp generates."""
    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.n_ctx, asked.warmup, asked.cpuparams.n_threads = 64, False, 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    return xllamacpp.Server(asked).handle_completions(body)["choices"][0]["text"]


@pytest.fixture(scope="module")
def letters():
    """Byte-level tokens of which each is a text of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())[:63]
    tokens = [*signs, signs[1] + signs[1]]
    merges = [(signs[1], signs[1])]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=signs[2])  # as in the models


@pytest.mark.parametrize("portable", ["llama.cpp", "transformers"])
def test_greedy_tokens_are_those_of_transformers(narrowed, ids, letters, tmp_path, portable):
    model = narrowed(portable, keep_targets=0.75)
    check(model, ids, letters, tmp_path)


def test_every_block_has_its_own_heads(few_heads, ids, letters, tmp_path):
    check(few_heads, ids, letters, tmp_path)


def test_a_qwen2_with_biases(tiny_qwen2, ids, letters, tmp_path):
    check(tiny_qwen2, ids, letters, tmp_path)


def check(model, ids, tokenizer, tmp_path):
    with torch.no_grad():  # random logits are nearly flat, and rounding would choose
        model.get_output_embeddings().weight.mul_(50)
    tnlm.export(model, tmp_path, to="gguf", type="F32", tokenizer=tokenizer)
    prompt = ids[:1, :6]
    mask = torch.ones_like(prompt)
    made = model.generate(
        prompt, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    text = greedy(tmp_path / "model-F32.gguf", prompt[0].tolist(), 8)
    assert text == tokenizer.decode(made[0, 6:])
