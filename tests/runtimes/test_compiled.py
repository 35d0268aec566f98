"""Compiled decoding gives the same tokens, and says why where it cannot be."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import tnlm
from tnlm.errors import ModelError, OptionError
from tnlm.runtimes.compiled import compile_decoding

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def tokens_of(model):
    ids = torch.arange(12).reshape(2, 6) + 3
    return model.eval().generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)


@pytest.mark.parametrize("scheme", [None, "svd", "kron"])
def test_tokens_are_those_of_the_uncompiled_model(scheme, tiny_llama, monkeypatch):
    model = tiny_llama()
    if scheme is not None:
        tnlm.compress(model, scheme, keep_targets=0.6, progress=False)
    expected = tokens_of(model)
    compiles = []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiles.append(k) or original(*a, **k))
    assert torch.equal(tokens_of(compile_decoding(model, backend="aot_eager")), expected)
    assert [each["backend"] for each in compiles] == ["aot_eager"]


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)  # torch's
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_the_default_backend_gives_these_tokens_too(tiny_llama):
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    expected = tokens_of(model)
    assert torch.equal(tokens_of(compile_decoding(model)), expected)


def test_a_missing_compiler_is_named(tiny_llama, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = tiny_llama()
    with pytest.raises(ModelError, match="no-such-compiler is not on PATH; install it"):
        compile_decoding(model)
    assert model.generation_config.cache_implementation is None
    compile_decoding(model, backend="eager")


def test_unknown_backends_are_refused(tiny_llama):
    with pytest.raises(OptionError, match="backend='quick'; allowed: cudagraphs, inductor"):
        compile_decoding(tiny_llama(), backend="quick")


def test_models_without_text_or_static_cache_are_refused(tiny_llama, monkeypatch):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = ViTConfig(**small, intermediate_size=16, image_size=8, patch_size=4)
    with pytest.raises(ModelError, match="ViTForImageClassification does not generate text"):
        compile_decoding(ViTForImageClassification(vision))
    model = tiny_llama()
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    with pytest.raises(ModelError, match="cannot compile LlamaForCausalLM: it has no static cache"):
        compile_decoding(model)


def test_a_saved_model_is_not_compiled_when_loaded(tiny_llama, tmp_path):
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    before = model.generation_config.to_dict()
    compile_decoding(model, backend="eager")
    tnlm.save(model, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert "cache_implementation" not in saved
    assert tnlm.load(tmp_path / "saved").generation_config.to_dict() == before
    assert model.generation_config.cache_implementation == "static"
