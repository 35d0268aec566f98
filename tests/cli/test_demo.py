"""The main job on the real SmolLM2-135M-Instruct, whose package `make install` brings."""

from __future__ import annotations

import copy

import pytest
import torch

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.cli import demo
from tnlm.evaluation import perplexity


def test_the_two_halves_of_the_text_share_no_paragraph():
    learn, measure = demo.text_halves()
    assert not set(learn.split("\n\n")) & set(measure.split("\n\n"))


@pytest.mark.slow
def test_a_real_model_is_compressed_reloaded_and_still_speaks(tmp_path):
    dense, tokenizer = load_model(demo.find_model())
    learn, measure = demo.text_halves()
    protocol = {"window": 256, "windows": 4}
    before = perplexity(dense, measure, tokenizer, **protocol).perplexity
    model = tnlm.compress(
        copy.deepcopy(dense),
        "svd-llm",
        keep_targets=0.8,
        calibration=[learn],
        tokenizer=tokenizer,
        num_samples=16,
        max_length=256,
    )
    report = tnlm.report(model)
    assert report.parameters_before == 134_515_008
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.plan.targets_after.params <= 0.8 * report.plan.targets_before.params
    assert report.plan.targets_after.macs <= report.plan.targets_before.macs

    after = perplexity(model, measure, tokenizer, **protocol).perplexity
    assert before < after < 2.5 * before  # plain truncation at this size: a factor of 10**7

    folder = tnlm.save(model, tmp_path / "model", tokenizer=tokenizer)
    ids = tokenizer(demo.PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(tnlm.load(folder)(ids).logits, model(ids).logits)
    said = demo.generate(model, tokenizer)
    assert said.startswith(demo.PROMPT)
    assert len(said) > len(demo.PROMPT)
