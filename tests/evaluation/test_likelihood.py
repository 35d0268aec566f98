from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.evaluation.made import WORDS
from tnlm.errors import EvaluationError
from tnlm.evaluation.encoding import Encoded, encode, encode_all, encode_pair, window_of
from tnlm.evaluation.generation import cut, generate
from tnlm.evaluation.likelihood import loglikelihoods
from tnlm.evaluation.prefix import can_share

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)
ids = st.lists(st.integers(3, 63), min_size=1, max_size=6).map(tuple)
asked = st.lists(st.tuples(ids, ids).map(lambda pair: Encoded(*pair)), min_size=1, max_size=6)


@given(texts, texts, st.integers(0, 3))
def test_a_pair_is_the_whole_text_cut_in_two(word_tokenizer, context, continuation, spaces):
    pair = encode_pair(word_tokenizer, context + " " * spaces, f" {continuation}")
    whole = encode(word_tokenizer, f"{context} {continuation}")
    assert [*pair.context, *pair.continuation] == whole
    assert len(pair.context) == len(context.split())


@given(asked)
def test_batches_and_company_do_not_matter(tiny_llama, pairs):
    model, names = tiny_llama(num_hidden_layers=1), [str(i) for i in range(len(pairs))]
    together = loglikelihoods(model, pairs, names, window=64, batch_size=4)
    alone = [loglikelihoods(model, [p], ["x"], window=64, batch_size=1)[0] for p in pairs]
    for one, other in zip(together, alone, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)
        assert one.loglikelihood < 0
        assert one.tokens == other.tokens


questions = st.lists(st.integers(3, 63), min_size=20, max_size=40).map(tuple)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@given(data=st.data(), window=st.sampled_from([16, 64]))
def test_choices_after_one_question_share_its_pass(kind, data, window, request):
    model, lengths = request.getfixturevalue(kind)(), []
    question = data.draw(questions)
    words = st.lists(st.integers(3, 63), min_size=2, max_size=6).map(tuple)
    choices = data.draw(st.lists(words, min_size=5, max_size=7, unique_by=lambda ids: ids[0]))
    pairs = [Encoded(question, choice) for choice in choices]
    names = [""] * len(pairs)
    alone = [loglikelihoods(model, [p], [""], window=window, batch_size=1)[0] for p in pairs]
    model.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape), with_kwargs=True
    )
    found = loglikelihoods(model, pairs, names, window=window, batch_size=8)
    for one, other in zip(found, alone, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)
        assert (one.greedy, one.tokens) == (other.greedy, other.tokens)
    if window == 64:  # nothing is cut off
        run = [(1, len(question) - 1), (len(choices), max(map(len, choices)))]
        assert lengths[-2:] == run  # after the model was tried


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
@given(data=st.data())
def test_what_all_questions_begin_with_is_run_once(kind, data, request):
    model, seen = request.getfixturevalue(kind)(), []
    examples = tuple(3 + i * i % 60 for i in range(70))
    own = st.lists(st.integers(3, 63), max_size=6).map(tuple)
    contexts = [(*examples, *more, 5) for more in data.draw(st.lists(own, min_size=1, max_size=4))]
    pairs = [Encoded(c, (first, 9)) for c in contexts for first in (6, 7, 8)]
    alone = [loglikelihoods(model, [p], [""], window=90, batch_size=1)[0] for p in pairs]
    model.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    found = loglikelihoods(model, pairs, [""] * len(pairs), window=90, batch_size=6)
    for one, other in zip(found, alone, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)
        assert one.greedy == other.greedy
    tried = 2 + 2 + 6
    assert sum(seen) <= tried + 70 + len(contexts) * (6 + 3 * 2)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
STRETCHED = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
        lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=8)),
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=STRETCHED)),
        lambda: Forgetful(LlamaConfig(**SIZES)),
        lambda: Shy(LlamaConfig(**SIZES)),
    ],
)
def test_a_model_that_does_more_with_its_past_shares_nothing(make):
    torch.manual_seed(0)
    model, question = make().eval(), tuple(range(3, 43))
    assert not can_share(model)
    pairs = [Encoded(question, (first, 9)) for first in range(5, 10)]
    found = loglikelihoods(model, pairs, [""] * 5, window=64, batch_size=8)
    for pair, answer in zip(pairs, found, strict=True):
        [one] = loglikelihoods(model, [pair], [""], window=64, batch_size=1)
        assert answer.loglikelihood == pytest.approx(one.loglikelihood, abs=1e-4)


class Forgetful(LlamaForCausalLM):
    """Takes a past and does not look at it."""

    def forward(self, input_ids, use_cache=None, cache=None):
        return super().forward(input_ids, use_cache=use_cache)


class Shy(LlamaForCausalLM):
    """Has no past."""

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=super().forward(input_ids, use_cache=False).logits)


def test_the_likelihoods_of_all_next_tokens_sum_to_one(tiny_llama):
    pairs = [Encoded((5, 6), (token,)) for token in range(64)]
    found = loglikelihoods(tiny_llama(), pairs, [""] * 64, window=8, batch_size=8)
    assert math.fsum(math.exp(answer.loglikelihood) for answer in found) == pytest.approx(1)
    assert sum(answer.greedy for answer in found) == 1


def test_one_pass_serves_all_choices_of_one_token(tiny_llama):
    model, calls = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1) and None)
    pairs = [Encoded((5, 6), (token,)) for token in range(8)]
    loglikelihoods(model, pairs, [""] * 8, window=8, batch_size=1)
    assert len(calls) == 1


def test_what_does_not_fit_loses_its_first_tokens(tiny_llama):
    model = tiny_llama()
    long, short = Encoded((9, 8, 7, 6), (5,)), Encoded((7, 6), (5,))
    found = loglikelihoods(model, [long, short], ["", ""], window=2, batch_size=1)
    assert found[0] == found[1]


def test_a_text_that_starts_with_bos_gets_no_other(word_tokenizer):
    assert encode(word_tokenizer, "<s> word0") == [2, 3]
    assert encode_pair(word_tokenizer, "", "<s> word0") == Encoded((2,), (3,))
    assert encode_pair(word_tokenizer, "", "word0 word1") == Encoded((2,), (3, 4))


def test_pairs_that_cannot_be_scored(word_tokenizer):
    with pytest.raises(EvaluationError, match="item 3: ' ' has no tokens of its own"):
        encode_all(word_tokenizer, [("word1", " ")], ["item 3"], 8)
    bare = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer.backend_tokenizer)
    with pytest.raises(EvaluationError, match="no BOS and no EOS"):
        encode_pair(bare, "", "word1")


def test_the_window_is_the_models_then_the_tokenizers(tiny_llama, word_tokenizer):
    model = tiny_llama()
    assert window_of(model, word_tokenizer, None) == 128
    assert window_of(model, word_tokenizer, 9) == 9
    config = SimpleNamespace(get_text_config=SimpleNamespace)
    assert window_of(SimpleNamespace(config=config), word_tokenizer, None) == 16


def test_generation_pads_on_the_left_and_stops(tiny_llama, word_tokenizer):
    model = tiny_llama(eos_token_id=None)
    rest = {"window": 64, "max_new_tokens": 5}
    prompts = ["word1", "word2 word3 word4", "word5 word6"]
    options = {"until": (), **rest}
    together = generate(model, word_tokenizer, prompts, prompts, batch_size=3, **options)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = generate(model, word_tokenizer, [prompt], [prompt], batch_size=1, **options)
        assert answer == alone
    stop = together[0].text.split()[2]
    options = {"until": (stop,), **rest}
    [stopped] = generate(model, word_tokenizer, ["word1"], ["word1"], batch_size=1, **options)
    assert stopped.text == cut(together[0].text, [stop])
    assert model.generation_config.do_sample is not True
