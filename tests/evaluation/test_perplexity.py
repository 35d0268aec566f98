from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tnlm.calibration.data import token_batches
from tnlm.calibration.loss import make_tasks
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation import perplexity
from tnlm.evaluation.perplexity import batch_perplexity


def reference(model, ids):
    """Compute the loss from all windows at once, in float64."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    return float(-logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean())


def test_protocol_equals_the_formula(tiny_llama, word_tokenizer, word_text):
    model, text = tiny_llama(), word_text(70)
    result = perplexity(model, text, word_tokenizer, window=16, windows=3)
    ids = torch.tensor(word_tokenizer(text)["input_ids"][:48]).reshape(3, 16)
    assert result.loss == pytest.approx(reference(model, ids), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.window, result.windows, result.tokens) == (16, 3, 45)


def test_rows_of_ids_have_the_perplexity_of_the_text_they_make(
    tiny_llama, word_tokenizer, word_text
):
    model, text = tiny_llama(), word_text(48)
    ids = torch.tensor(word_tokenizer(text)["input_ids"]).reshape(3, 16)
    tasks = make_tasks(model, token_batches(ids, max_length=16, num_samples=3), "data")
    expected = perplexity(model, text, word_tokenizer, window=16).perplexity
    assert batch_perplexity(model, tasks) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(EvaluationError, match="nothing to predict"):
        batch_perplexity(model, [])


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny_gpt2, word_tokenizer, word_text):
    model = tiny_gpt2(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, word_text(20), word_tokenizer, window=10).perplexity == pytest.approx(
        64, rel=1e-5
    )


def test_a_shorter_text_gives_fewer_windows(tiny_llama, word_tokenizer, word_text):
    result = perplexity(tiny_llama(), word_text(37), word_tokenizer, window=8, windows=16)
    assert (result.windows, result.tokens) == (4, 28)


def test_files_and_texts_give_the_same(tiny_llama, word_tokenizer, word_text, tmp_path):
    model, texts = tiny_llama(), [word_text(20, seed=seed) for seed in range(2)]
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("\n\n".join(texts))
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sources = ["\n\n".join(texts), plain, str(plain), lines]
    assert len({perplexity(model, s, word_tokenizer, window=8) for s in sources}) == 1


def test_the_model_is_left_as_it_was(tiny_llama, word_tokenizer, word_text):
    model = tiny_llama(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    first, second = (
        perplexity(model, word_text(20), word_tokenizer, window=8).loss for _ in range(2)
    )
    assert first == second
    assert [module.training for module in model.modules()] == before


def test_bfloat16_is_measured_in_float32(tiny_llama, word_tokenizer, word_text):
    model = tiny_llama().to(torch.bfloat16)
    result = perplexity(model, word_text(20), word_tokenizer, window=8)
    assert result.loss != float(torch.tensor(result.loss, dtype=torch.bfloat16))


def test_a_loss_that_is_not_finite_names_the_window(tiny_llama, word_tokenizer, word_text):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = float("nan")
    text = " ".join(["word1"] * 16 + ["word0"] * 8)
    with pytest.raises(EvaluationError, match="window 2"):
        perplexity(model, text, word_tokenizer, window=8)
    assert not model.training


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("word0 a", {"window": 8}, "2 tokens, fewer than one window of 8; no file has that name"),
        ("word0", {"window": 8}, "'word0' is not an existing file: no such file"),
        ("", {"window": 8}, "0 tokens"),
        ("word0", {"window": 1}, "window=1 predicts nothing"),
        ("word0", {"window": 129}, "window=129, but the model has 128 positions"),
    ],
)
def test_bad_requests(text, options, message, tiny_llama, word_tokenizer):
    with pytest.raises(EvaluationError, match=message):
        perplexity(tiny_llama(), text, word_tokenizer, **options)


def test_missing_file(tiny_llama, word_tokenizer, tmp_path):
    with pytest.raises(EvaluationError, match="no such file"):
        perplexity(tiny_llama(), tmp_path / "none.txt", word_tokenizer, window=8)


def test_zero_windows(tiny_llama, word_tokenizer):
    with pytest.raises(OptionError, match="windows=0"):
        perplexity(tiny_llama(), "word0 word1", word_tokenizer, window=2, windows=0)


def test_no_tokenizer_and_a_foreign_one(tiny_llama, word_tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(EvaluationError, match="tokenizer"):
        perplexity(tiny_llama(), "word0 word1", None, window=2)
    with pytest.raises(EvaluationError, match="id 63, but the model has 10 tokens"):
        perplexity(tiny_llama(vocab_size=10), "word60 word60", word_tokenizer, window=2)


def test_an_encoder_has_no_perplexity(tiny_bert, word_tokenizer, word_text):
    with pytest.raises(EvaluationError, match="a BertModel predicts no next token"):
        perplexity(tiny_bert(), word_text(20), word_tokenizer, window=8)
