from __future__ import annotations

import copy
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import tnlm
from tnlm.calibration.data import fingerprint, token_batches
from tnlm.calibration.text import start_token
from tnlm.errors import EvaluationError, OptionError
from tnlm.recovery.examples import training_set

BOS = 2


@pytest.fixture(scope="module")
def bos_tokenizer(word_tokenizer):
    """A tokenizer that puts BOS in front, as Gemma's and Llama's do."""
    made = copy.deepcopy(word_tokenizer)
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return made


def test_the_tokenizers_own_habit_is_followed(word_tokenizer, bos_tokenizer):
    assert start_token(word_tokenizer) is None
    assert start_token(bos_tokenizer) == BOS
    assert start_token(word_tokenizer, True) == BOS
    assert start_token(bos_tokenizer, False) is None


def test_what_only_ends_a_text_is_no_start(word_tokenizer):
    ends = copy.deepcopy(word_tokenizer)
    ends.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <s>", special_tokens=[("<s>", BOS)]
    )
    assert start_token(ends) is None


@pytest.mark.parametrize("bos", ["always", None, 0, 1, 2, "True"])
def test_other_words_are_refused(bos, word_tokenizer):
    with pytest.raises(OptionError, match=r"bos=.*True or False"):
        start_token(word_tokenizer, bos)


def test_a_tokenizer_without_bos_cannot_be_told_to(word_tokenizer):
    none = copy.deepcopy(word_tokenizer)
    none.bos_token = None
    assert start_token(none) is None
    with pytest.raises(OptionError, match="no BOS token"):
        start_token(none, True)


def test_a_window_keeps_its_length_and_loses_no_text(bos_tokenizer, word_text):
    text = [word_text(21)]
    plain = token_batches(text, bos_tokenizer, max_length=8, bos=False)
    begun = token_batches(text, bos_tokenizer, max_length=8)
    rows = torch.cat([batch["input_ids"] for batch in begun])
    assert rows.shape == (3, 8)
    assert (rows[:, 0] == BOS).all()
    joined = torch.cat([batch["input_ids"].flatten() for batch in plain])
    assert torch.equal(rows[:, 1:].flatten()[:16], joined)


def test_a_tokenizer_without_the_habit_gives_what_it_gave(word_tokenizer, word_text):
    text = [word_text(40)]
    found, told = (
        token_batches(text, word_tokenizer, max_length=8, bos=b) for b in ("auto", False)
    )
    assert fingerprint(found) == fingerprint(told)


def test_ids_are_taken_as_they_are(bos_tokenizer):
    ids = torch.arange(3, 19)
    plain = fingerprint(token_batches(ids, max_length=8))
    assert fingerprint(token_batches(ids, bos_tokenizer, max_length=8)) == plain
    with pytest.raises(OptionError, match="bos=True is for text"):
        token_batches(ids, bos_tokenizer, max_length=8, bos=True)


def test_long_texts_begin_alike(bos_tokenizer, word_text, monkeypatch):
    monkeypatch.setattr("tnlm.calibration.windows.WHOLE", 100)
    rows = token_batches([word_text(200)], bos_tokenizer, max_length=8, num_samples=3)
    assert [batch["input_ids"][0, 0] for batch in rows] == [BOS] * 3


def test_every_token_after_bos_is_predicted(tiny_llama, bos_tokenizer, word_text):
    model, text = tiny_llama(), [word_text(22)]
    found = tnlm.perplexity(model, text, bos_tokenizer, window=8)
    assert (found.windows, found.tokens, found.bos) == (3, 21, True)
    assert str(found).endswith("(3 windows of 8 tokens, 21 predictions, after BOS)")
    ids = torch.tensor(bos_tokenizer(text[0], add_special_tokens=False)["input_ids"][:21])
    rows = torch.cat([torch.full((3, 1), BOS), ids.reshape(3, 7)], 1)
    with torch.no_grad():
        logs = model(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
    loss = float(-logs.gather(-1, rows[:, 1:, None]).mean())
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_user_chooses(tiny_llama, word_tokenizer, bos_tokenizer, word_text):
    model, text = tiny_llama(), [word_text(22)]
    plain = tnlm.perplexity(model, text, word_tokenizer, window=8)
    assert plain == tnlm.perplexity(model, text, bos_tokenizer, window=8, bos=False)
    begun = tnlm.perplexity(model, text, bos_tokenizer, window=8)
    assert begun == tnlm.perplexity(model, text, word_tokenizer, window=8, bos=True)
    assert plain.loss != begun.loss
    assert "BOS" not in str(plain)
    with pytest.raises(EvaluationError, match="6 tokens, fewer than one window of 8"):
        tnlm.perplexity(model, [word_text(6)], bos_tokenizer, window=8)


def test_the_report_and_the_statistics_say_so(tiny_llama, word_tokenizer, bos_tokenizer, word_text):
    options = {"calibration": [word_text(300)], "max_length": 16, "rank": 4, "progress": False}

    def made(tokenizer, **more):
        return tnlm.compress(tiny_llama(), "svd-llm", tokenizer=tokenizer, **options, **more)

    begun, plain = made(bos_tokenizer), made(word_tokenizer)
    assert tnlm.report(begun).data["bos"] is True
    assert "bos" not in tnlm.report(plain).data
    assert tnlm.report(begun).fingerprint != tnlm.report(plain).fingerprint
    told = made(bos_tokenizer, bos=False)
    assert tnlm.report(told).fingerprint == tnlm.report(plain).fingerprint
    assert tnlm.report(told).to_json() != ""


def test_training_and_analysis_follow(tiny_llama, bos_tokenizer, word_text):
    text, words = [word_text(40)], {"max_length": 8}
    first = training_set(text, bos_tokenizer, **words).items[0]
    assert first["input_ids"][0] == BOS
    assert first["labels"][:2].tolist() == [-100, int(first["input_ids"][1])]
    assert training_set(text, bos_tokenizer, **words, bos=False).items[0]["input_ids"][0] != BOS
    found = tnlm.analyze(tiny_llama(), text, tokenizer=bos_tokenizer, progress=False, **words)
    assert found.protocol["bos"] is True
