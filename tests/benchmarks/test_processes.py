"""Several processes are timed beside one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.benchmarks.conftest import BENCHMARKS


@pytest.mark.slow
def test_processes_are_timed_beside_one(tiny_llama, word_tokenizer, word_text, tmp_path):
    model, text, out = tmp_path / "m", tmp_path / "text.txt", tmp_path / "out"
    tiny_llama().save_pretrained(model)
    word_tokenizer.save_pretrained(model)
    text.write_text(word_text(200))
    script = [sys.executable, BENCHMARKS / "processes.py", model, text]
    options = ["--windows", "3", "--length", "16", "--out"]
    subprocess.run([*script, *options, out], check=True, capture_output=True)
    figures = json.loads((out / "processes.json").read_text())
    assert {count: len(runs) for count, runs in figures.items()} == {"1": 1, "2": 1}
    assert "| processor |" in (out / "processes.md").read_text()
