from __future__ import annotations

import logging

import pytest
import torch

import tnlm
from tnlm.compression import blind


def said(caplog, model, scheme, **keywords):
    with caplog.at_level(logging.WARNING, logger="tnlm"):
        tnlm.plan(model, scheme, progress=False, **keywords)
    return [text for text in caplog.messages if "without data" in text]


@pytest.mark.parametrize("scheme", ["svd", "kron", "tt"])
def test_a_fit_of_a_language_model_without_data_warns(scheme, tiny_llama, caplog):
    [text] = said(caplog, tiny_llama(), scheme)
    assert text.startswith(f"{scheme} without data is predicted to change a matrix by ")
    assert "calibration=" in text
    assert "LlamaForCausalLM" in text


def test_the_error_is_the_one_of_the_fit(tiny_llama, caplog):
    model = tiny_llama()
    [text] = said(caplog, model, "svd", targets=["q_proj"], keep_targets=0.5)
    done = tnlm.report(tnlm.compress(model, "svd", targets=["q_proj"], keep_targets=0.5)).plan
    mean = sum(layer.error for layer in done.layers) / len(done.layers)
    assert f"by {100 * mean:.0f} % of its norm (mean of 2 of 2)" in text


@pytest.mark.parametrize(
    "keywords",
    [{"scheme": "rtn"}, {"scheme": "svd", "tolerance": 0.05}, {"scheme": "svd", "recover": "lora"}],
)
def test_no_word_where_little_changes_or_training_follows(keywords, tiny_llama, caplog):
    data = (
        {"training": torch.arange(64) % 61 + 3, "max_length": 16} if "recover" in keywords else {}
    )
    model = tiny_llama()
    if "tolerance" in keywords:  # something of low rank, so that matrices shrink within it
        for block in model.model.layers:
            weight = block.self_attn.q_proj.weight
            weight.data = weight.data[:, :1] @ weight.data[:1]
    assert not said(caplog, model, **keywords, **data)


def test_no_word_for_a_model_that_writes_nothing(make_model, caplog):
    assert not said(caplog, make_model("bert"), "svd")


def test_few_matrices_are_looked_at(tiny_llama, monkeypatch, caplog):
    seen = []
    real = blind._error
    monkeypatch.setattr(blind, "_error", lambda *a: seen.append(a[-1].name) or real(*a))
    [text] = said(caplog, tiny_llama(num_hidden_layers=3), "svd")
    assert len(seen) <= blind.SAMPLES
    assert f"(mean of {len(seen)} of 21)" in text
