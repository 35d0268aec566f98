"""Real llama.cpp runs what is exported; `make test-serving` installs it."""

from __future__ import annotations

import pytest
import torch

import tnlm

xllamacpp = pytest.importorskip("xllamacpp")


def greedy(path, prompt, count, draft=None):
    """Return the text that llama.cpp generates, and how many tokens were drafted for it."""
    asked = xllamacpp.CommonParams()
    asked.model.path = str(path)
    asked.n_ctx, asked.warmup, asked.cpuparams.n_threads = 64, False, 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if draft is not None:
        kind = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE
        asked.speculative.types = [kind]
        asked.speculative.draft.mparams.path = str(draft)
        asked.speculative.draft.p_min = 0.0  # drafts however flat the distribution is
        asked.speculative.draft.cpuparams.n_threads = 1
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    made = xllamacpp.Server(asked).handle_completions(body)
    return made["choices"][0]["text"], made["timings"].get("draft_n", 0)


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


def test_a_compressed_model_drafts_for_the_dense_one(narrowed, tiny_llama, ids, letters, tmp_path):
    dense = tiny_llama(intermediate_size=128, num_hidden_layers=3)
    files = []
    for name, model in (("dense", dense), ("small", narrowed("llama.cpp"))):
        with torch.no_grad():  # as below
            model.get_output_embeddings().weight.mul_(50)
        tnlm.export(model, tmp_path / name, to="gguf", type="F32", tokenizer=letters)
        files.append(tmp_path / name / "model-F32.gguf")
    prompt = ids[0, :6].tolist()
    text, drafted = greedy(files[0], prompt, 16, draft=files[1])
    assert drafted > 0
    assert (text, 0) == greedy(files[0], prompt, 16)


def check(model, ids, tokenizer, tmp_path):
    with torch.no_grad():  # random logits are nearly flat, and rounding would choose
        model.get_output_embeddings().weight.mul_(50)
    tnlm.export(model, tmp_path, to="gguf", type="F32", tokenizer=tokenizer)
    prompt = ids[:1, :6]
    mask = torch.ones_like(prompt)
    made = model.generate(
        prompt, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    text, _ = greedy(tmp_path / "model-F32.gguf", prompt[0].tolist(), 8)
    assert text == tokenizer.decode(made[0, 6:])
