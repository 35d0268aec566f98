from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tnlm.errors import ModelError
from tnlm.runtimes.gguf_tokens import BYTE, CONTROL, NORMAL, UNUSED, read_tokens

TEXT = ["the cat sat on the mat", "a cat and a hat", "the hat 123"]


def byte_level(*steps):
    made = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=["<s>"], show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def pieces():
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.ByteFallback()
    special = ["<unk>", "<s>", "<0x41>"]
    trainer = trainers.BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


def test_byte_level_tokens_keep_their_ids_and_merges():
    tokenizer = byte_level()
    found = read_tokens(tokenizer, 50)
    assert (found.model, found.split) == ("gpt2", "gpt-2")
    assert found.tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found.types[0] == CONTROL
    assert found.types[1] == NORMAL
    assert found.types[len(tokenizer) :] == [UNUSED] * (50 - len(tokenizer))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert [tuple(merge.split(" ")) for merge in found.merges] == [tuple(m) for m in merges]
    assert found.special["bos"] == 0
    assert not found.add_bos


def test_single_digits_are_a_way_to_split_of_their_own():
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True))
    assert read_tokens(tokenizer, 50).split == "smollm"


def test_sentencepiece_scores_follow_the_merges():
    tokenizer = pieces()
    found = read_tokens(tokenizer, 60)
    assert (found.model, found.split, found.add_space) == ("llama", "", True)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    merged = ["".join(merge) for merge in merges]
    scores = [found.scores[found.tokens.index(token)] for token in merged]
    assert scores == sorted(scores, reverse=True)
    assert found.scores[found.tokens.index("t")] < scores[-1]  # no merge makes it
    assert found.types[tokenizer.convert_tokens_to_ids("<0x41>")] in (BYTE, CONTROL)


def test_an_unknown_way_to_split_is_refused():
    with pytest.raises(ModelError, match=r"splits by \['Punctuation', 'ByteLevel'\]"):
        read_tokens(byte_level(pre_tokenizers.Punctuation()), 50)


def test_another_kind_of_tokenizer_is_refused(word_tokenizer):
    with pytest.raises(ModelError, match="a WordLevel tokenizer cannot be written"):
        read_tokens(word_tokenizer, 64)


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(ModelError, match="the embedding has 3 rows"):
        read_tokens(byte_level(), 3)
