from __future__ import annotations

import pytest

from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation import decode_rates


def test_models_take_turns_and_decode_step_by_step(tiny_llama, tiny_gpt2):
    models = {"a": tiny_llama(), "b": tiny_gpt2()}
    calls = []
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: calls.append((name, kwargs["input_ids"].shape[1])),
            with_kwargs=True,
        )
    models["b"].train()
    rates = decode_rates(models, prompt_tokens=4, new_tokens=2, repeats=2)
    turn = [("a", 4), ("a", 1), ("a", 1), ("b", 4), ("b", 1), ("b", 1)]
    assert calls == turn * 3
    assert list(rates) == ["a", "b"]
    assert all(rate > 0 for rate in rates.values())
    assert not models["a"].training
    assert models["b"].training


def test_decoding_is_greedy_and_uses_the_cache(tiny_llama):
    model = tiny_llama()
    seen = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    decode_rates({"model": model}, prompt_tokens=5, new_tokens=4, repeats=1)
    prompt, *steps = seen[:5]
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [step.item() for step in steps] == expected[0, 5:].tolist()


@pytest.mark.parametrize("option", ["prompt_tokens", "new_tokens", "repeats"])
def test_counts_must_be_positive(option, tiny_llama):
    with pytest.raises(OptionError, match=f"{option}=0"):
        decode_rates({"model": tiny_llama()}, **{option: 0})


def test_no_models_and_too_many_tokens(tiny_llama):
    with pytest.raises(EvaluationError, match="no models"):
        decode_rates({})
    with pytest.raises(EvaluationError, match="= 132, but the model has 128 positions"):
        decode_rates({"model": tiny_llama()}, prompt_tokens=100, new_tokens=32)
