"""The main job on the real SmolLM2-135M-Instruct, whose package `make install` brings."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.cli import demo
from tnlm.evaluation import perplexity


def test_the_two_halves_of_the_text_share_no_paragraph():
    learn, measure = demo.text_halves()
    assert not set(learn.split("\n\n")) & set(measure.split("\n\n"))


@pytest.fixture
def small_demo(monkeypatch, tiny_llama, word_tokenizer):
    """Put a tiny model and short windows in the place of the real ones."""
    model = tiny_llama(max_position_embeddings=128)
    monkeypatch.setattr(demo, "find_model", lambda: Path("tiny.gguf"))
    monkeypatch.setattr(demo, "load_model", lambda _: (model, word_tokenizer))
    for name, less in (
        ("CALIBRATION", {"num_samples": 4, "gradient_samples": 2, "max_length": 16}),
        ("HEALING", {"tokens": 64, "max_length": 16}),
        ("MEASURED", {"window": 16, "windows": 2}),
        ("DECODED", {"new_tokens": 2, "repeats": 1}),
    ):
        monkeypatch.setattr(demo, name, {**getattr(demo, name), **less})


@pytest.mark.usefixtures("small_demo")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_every_result_is_shown_as_it_comes_the_best_first(tmp_path):
    lines = []
    result = demo.run(tmp_path / "out", lines.append, progress=False)
    assert str(tmp_path / "out") in lines[0]
    assert "Q4_1" in lines[1]
    titles = ["dense", "auto at 0.8", "auto at 0.8, stored in int8", "auto at 0.8, healed"]
    assert list(result["models"]) == [*titles, "kron, 4 terms, without data"]
    shown = [line.split("\n")[1] for line in lines if line.startswith(demo.HEADING)]
    assert [line[:34].strip() for line in shown] == list(result["models"])
    assert json.loads((tmp_path / "out" / "demo.json").read_text()) == result
    check_rows(tmp_path / "out", result["models"])


def check_rows(out, rows):
    """What is shown is what was saved, and loads again."""
    dense = rows.pop("dense")
    for row in rows.values():
        files = [file.stat().st_size for file in (out / row["folder"]).glob("*.safetensors")]
        assert row["bytes"] == sum(files)
        assert row["parameters"] < dense["parameters"]
        assert row["macs"] < dense["macs"]
        assert row["reload_difference"] < 1e-6
        assert row["says"]


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
