"""A compressed model drafts for the dense one, which keeps what it would have said itself."""

from __future__ import annotations

import pytest
import torch

import tnlm

PROMPT = torch.arange(12).reshape(1, 12) % 61 + 3
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def generate(model, **options):
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY, **options)


def drafted(dense, draft):
    """Return the tokens, and how often the dense model was asked for them."""
    calls = []
    handle = dense.register_forward_hook(lambda *_: calls.append(None))
    made = generate(dense, assistant_model=draft)
    handle.remove()
    return made, len(calls)


@pytest.mark.parametrize("scheme", ["svd", "kron", "modegpt", "rtn"])
def test_tokens_are_those_of_the_dense_model(scheme, make_model, compressed):
    dense = make_model("llama")
    made, _ = drafted(dense, compressed("llama", scheme))
    assert torch.equal(made, generate(dense))


def test_a_saved_draft_that_is_nearly_the_model_saves_most_passes(make_model, tmp_path):
    draft = tnlm.compress(make_model("llama"), "rtn", precision="int8", progress=False)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.assistant_confidence_threshold = 0.0
    tnlm.save(draft, tmp_path)
    dense = make_model("llama")
    made, calls = drafted(dense, tnlm.load(tmp_path))
    assert torch.equal(made, generate(dense))
    assert calls <= 12  # 24 without a draft
