"""Served models are timed, in transformers and in vLLM."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import tnlm
from tests.benchmarks.conftest import BENCHMARKS


def test_serving_times_first_and_later_tokens(run, tmp_path, tiny_llama):
    tiny_llama(vocab_size=512).save_pretrained(tmp_path / "dense")
    given = f"dense={tmp_path / 'dense'}", f"same={tmp_path / 'dense'}"
    options = "--batches 1 2 --prompts 4 --new-tokens 3 --dtypes float32"
    figures, text = run("serving", *given, *options.split())
    rows = figures["rows"]
    assert [(row["batch"], row["variant"]) for row in rows] == [
        (batch, name) for batch in ("1", "2") for name in ("dense", "same")
    ]
    for row in rows:
        assert row["first_seconds"] > 0
        assert row["between_seconds"] > 0
        assert row["cache_bytes"] == int(row["batch"]) * rows[0]["cache_bytes"]
    assert rows[0]["first_speed"] == 1
    assert "| dense | float32 | eager | 2 | 4 | same |" in text


@pytest.fixture
def vllm_python(tmp_path):
    """Stand in for a Python with vLLM: an echo of the same tokens, in one second."""

    def make(tokens: list[list[int]]) -> Path:
        said = json.dumps({"seconds": 1.0, "threads": 1, "tokens": tokens})
        file = tmp_path / "python"
        answer = f"print('RESULT', {said!r}, flush=True)"
        file.write_text(f"#!{sys.executable}\nimport sys\nfor _ in sys.stdin: {answer}\n")
        file.chmod(0o755)
        return file

    return make


def run_vllm_serving(monkeypatch, capsys, *words: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["vllm_serving", *map(str, words)])
    runpy.run_path(str(BENCHMARKS / "vllm_serving.py"), run_name="__main__")
    return json.loads(capsys.readouterr().out)


def test_speed_in_vllm_is_a_median_of_turns(monkeypatch, capsys, vllm_python):
    sizes = ["--width", 64, "--layers", 1, "--vocabulary", 32, "--prompts", 4, "--count", 5]
    words = ["speed", *sizes, "--turns", 3, "--python", vllm_python([[1]])]
    found = run_vllm_serving(monkeypatch, capsys, *words)
    assert found["ratios"] == [1.0] * 3
    assert found["tokens_per_second"] == [20.0, 20.0]
    assert found["parameters"][1] < found["parameters"][0]


def test_tokens_in_vllm_are_compared(
    monkeypatch, capsys, vllm_python, tmp_path, tiny_llama, word_tokenizer, word_text
):

    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.6, progress=False)
    tnlm.save(model, tmp_path / "small", tokenizer=word_tokenizer)
    (tmp_path / "text.txt").write_text(word_text(64))
    words = ["tokens", tmp_path / "small", "--text", tmp_path / "text.txt", "--prompts", 2]
    words += ["--prompt-tokens", 4, "--count", 3, "--python", vllm_python([[0] * 3] * 2)]
    found = run_vllm_serving(monkeypatch, capsys, *words)
    assert found["equal"] + len(found["others"]) == found["prompts"] == 2
    assert all(other["log_ratio"] >= 0 for other in found["others"])
