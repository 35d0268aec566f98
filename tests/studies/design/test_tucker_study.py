"""The benchmark on a tiny model with metrics of our own; what they measure is not looked at."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

import tnlm
from tnlm.errors import EvaluationError


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    sys.modules.pop("tucker_study", None)
    yield importlib.import_module("tucker_study")
    sys.modules.pop("tucker_study", None)


@pytest.fixture
def deep(tiny_llama):
    return tiny_llama(num_hidden_layers=30, hidden_size=8, intermediate_size=12)


@pytest.mark.filterwarnings("ignore:.*IProgress not found")
def test_the_study_is_resumed_and_written_as_a_table(benchmark, deep, tmp_path, loss):
    calls = []

    def good(model):
        calls.append("good")
        return 1 / loss(model)

    def stopped(model):
        calls.append("stopped")
        if calls.count("stopped") == 4:
            raise KeyboardInterrupt
        if calls.count("stopped") == 3:
            raise EvaluationError("no logits")
        return 0.5

    metrics = {"a": good, "b": stopped}
    with pytest.raises(KeyboardInterrupt):
        benchmark.study(deep, metrics, tmp_path, rank=1, limit=7)
    assert (tmp_path / "b-7.jsonl").is_file()
    rows = benchmark.study(deep, metrics, tmp_path, rank=1, limit=7)
    assert calls.count("good") == 11
    assert calls.count("stopped") == 12  # one of them twice
    assert [len(row["layers"]) for row in rows[:4]] == [0, 2, 3, 5]
    assert rows[-1]["layers"] == list(range(30))
    assert 0 == rows[0]["percent"] < rows[1]["percent"] < rows[-1]["percent"]
    assert all(row["percent"] >= row["published_percent"] for row in rows)
    assert rows[2]["failed"] == {"b": "EvaluationError: no logits"}
    assert rows[5]["accuracy"]["a"] + rows[5]["drop"]["a"] == rows[0]["accuracy"]["a"]
    text = benchmark.as_text(rows, 101)
    assert len(text.splitlines()) == 15
    assert "| 6.0 % |" in text
    assert "failed" in text
    assert "at most 5.0 points" in text
    json.dumps(rows, allow_nan=False)


def test_accuracies_come_from_evaluate(benchmark, deep, word_tokenizer, tmp_path):
    rows = [{"query": f"word{i}", "choices": ["word1", "word2"], "gold": i % 2} for i in range(6)]
    (tmp_path / "arc_easy_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"task": "arc_easy", "tokenizer": word_tokenizer, "data": tmp_path}
    found = benchmark.accuracy(deep, limit=4, **options)
    known = tnlm.evaluate(
        deep, ["arc_easy"], tokenizer=word_tokenizer, data=tmp_path, limit=4, progress=False
    )
    assert found == known["arc_easy"]["acc"].value
    with pytest.raises(EvaluationError, match=r"arc_easy has 6 items in .*; --limit asks for 100"):
        benchmark.accuracy(deep, limit=100, **options)


@pytest.mark.filterwarnings("ignore:.*IProgress not found")
def test_a_classifier_is_studied_on_its_own_task(benchmark, tiny_bert, word_tokenizer, tmp_path):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert(num_hidden_layers=6, num_labels=2).config)
    rows = [{"sentence": f"word{i} word{i % 7}", "label": i % 2} for i in range(12)]
    (tmp_path / "sst2_dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"tokenizer": word_tokenizer, "data": tmp_path, "task": "sst2"}
    scores = {"sst2": partial(benchmark.accuracy, limit=8, **options)}
    found = benchmark.study(model, scores, tmp_path, rank=1, limit=8)
    assert len(found) == 11
    assert found[1]["layers"] == [0, 5]  # published: 2 and 29 of 32
    assert found[-1]["layers"] == list(range(6))
    assert all(8 * row["accuracy"]["sst2"] % 1 == 0 for row in found)
    assert "| sst2 |" in benchmark.as_text(found, 8)
    with pytest.raises(EvaluationError, match=r"sst2 has 12 items in .*; --limit asks for 13"):
        benchmark.accuracy(model, limit=13, **options)
