"""Compressed models generate, train and change precision as any other."""

from __future__ import annotations

import copy

import pytest
import torch

import tnlm

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# One scheme for every way in which a layer computes.
SCHEMES = ["svd", "kron", "tucker", "tt", "btt", "albert", "tensorgpt", "modegpt"]

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@every_scheme
@pytest.mark.parametrize("kind", ["tied-llama", "gpt2"])
def test_a_static_cache_generates_the_same(kind, scheme, compressed):
    model = compressed(kind, scheme)
    dynamic = model.generate(IDS, **GREEDY)
    static = model.generate(IDS, cache_implementation="static", disable_compile=True, **GREEDY)
    assert dynamic.shape == (2, 18)
    assert torch.equal(static, dynamic)


@every_scheme
def test_generation_is_that_of_the_dense_form(scheme, compressed):
    model = compressed("tied-llama", scheme)
    assert torch.equal(model.generate(IDS, **GREEDY), tnlm.to_dense(model).generate(IDS, **GREEDY))


@every_scheme
def test_bfloat16_models_are_compressed_and_generate(scheme, make_model):
    asked = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
    asked = asked if scheme == "modegpt" else {}
    model = tnlm.compress(make_model("tied-llama").bfloat16(), scheme, **asked)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generate(IDS, **GREEDY).shape == (2, 18)
    expected = logits(copy.deepcopy(model).float())
    assert relative(logits(model).float(), expected) <= 0.05


@every_scheme
def test_autocast_stays_near(scheme, compressed):
    model = compressed("tied-llama", scheme)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(model)
    assert relative(found.float(), logits(model)) <= 0.05


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@every_scheme
def test_gradient_checkpointing_gives_the_same_gradients(scheme, compressed):
    plain, again = (
        compressed("tied-llama", scheme).train(),
        compressed("tied-llama", scheme).train(),
    )
    again.activation_checkpointing_enable()
    for model in (plain, again):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    found, expected = ({n: p.grad for n, p in m.named_parameters()} for m in (again, plain))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    optimizer.step()
    with torch.no_grad():
        after = float(again(IDS, labels=IDS).loss)
    assert after < float(plain(IDS, labels=IDS).loss.detach())
