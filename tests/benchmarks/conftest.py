"""Benchmarks run on tiny cases; what they measure is not looked at."""

from __future__ import annotations

import importlib
import json
import logging
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch, tmp_path):
    """Find sibling modules as a script does, and keep this machine's measurements apart."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TNLM_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def levels_stay():
    """Undo what a script sets for its own process: later tests would log more, or warn less."""
    logger = logging.getLogger("tnlm")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def run(monkeypatch, tmp_path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run a benchmark with options; return its figures and its Markdown text."""

    def run_it(name: str, *options: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / "out"
        words = [name, *options, "--repeats", 1, "--out", out]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        figures = json.loads((out / f"{name}.json").read_text())
        return figures, (out / f"{name}.md").read_text()

    return run_it


@pytest.fixture
def start(monkeypatch) -> Callable[..., None]:
    """Run a benchmark with these words on its command line."""

    def start_it(name: str, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")

    return start_it


@pytest.fixture
def classifier(tiny_bert, word_tokenizer, tmp_path):
    """Save a classifier of two classes, with its tokenizer."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert(num_labels=2).config)
    for saved in (model, word_tokenizer):
        saved.save_pretrained(tmp_path / "m")
    return model


@pytest.fixture
def python_pieces(monkeypatch):
    """Let models learn from a few lines, in small windows."""
    model, text = importlib.import_module("python_models"), importlib.import_module("python_text")
    lines = [f"def f{i}(x):\n    return x + {i}\n" for i in range(60)]
    monkeypatch.setattr(model, "python_text", lambda: text.PythonText(lines, lines[:9]))
    monkeypatch.setattr(model, "WINDOW", 16)
    monkeypatch.setattr(model, "BATCH", 2)
    monkeypatch.setattr(model, "SAVED", 2)
    return model
