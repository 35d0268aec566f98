"""Every example runs, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_first_compression(tmp_path, monkeypatch, capsys, tiny_llama, word_tokenizer, word_text):
    tiny_llama(seed=0).save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(word_text(1200, seed=2))
    script = EXAMPLES / "first_compression.py"
    asked = [script, tmp_path / "model", tmp_path / "text.txt", "--window", 32]
    monkeypatch.setattr(sys, "argv", [str(word) for word in asked])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[:3]] == ["dense", "svd", "svd-llm"]
    assert "params" in printed


def test_shapeshifter(monkeypatch, capsys):
    script = EXAMPLES / "shapeshifter.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--width", "32", "--steps", "20"])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    before, after, loaded = (float(line.split()[2]) for line in lines if line.startswith("loss"))
    assert loaded == after < before
