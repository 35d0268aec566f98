"""Classifiers are made, compressed and measured."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.usefixtures("classifier")
def test_classification_measures_before_and_after_and_resumes(start, tmp_path, capsys):
    rows = [{"text": f"word{i} word{i % 7}", "label": i % 2} for i in range(16)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = [
        tmp_path / "m",
        file,
        file,
        tmp_path / "out",
        "--scheme",
        "svd",
        "fwsvd",
        "lpaf",
        "magnitude-svd",
    ]
    options = ["--seeds", 1, "--tokens", 60, "--samples", 4, "--max-length", 8, "--share", 0.3]
    start("classification", *words, *options)
    found = json.loads((tmp_path / "out" / "classification.json").read_text())
    assert [row["scheme"] for row in found] == ["dense", "svd", "fwsvd", "lpaf", "magnitude-svd"]
    assert all(0 <= row["accuracy"] <= 1 for row in found)
    assert all(0 <= row["finetuned"] <= 1 for row in found[1:])
    capsys.readouterr()
    start("classification", *words, *options)
    assert json.loads((tmp_path / "out" / "classification.json").read_text()) == found
    assert "seed" not in capsys.readouterr().err  # nothing was measured again


def first(model: Any) -> torch.Tensor:
    return model.bert.encoder.layer[0].output.dense.weight


def test_a_classifier_is_made_of_an_encoder(start, classifier, tmp_path, capsys):
    rows = [{"sentence": f"word{i} word{i % 7}", "label": i % 2} for i in range(70)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = (tmp_path / "m", file, file, tmp_path / "made", "--text", "sentence")
    start("classifier", *words)
    printed = capsys.readouterr().out
    assert 0 <= float(re.search(r"accuracy ([\d.]+) %", printed).group(1)) <= 100
    made = BertForSequenceClassification.from_pretrained(tmp_path / "made")
    assert not torch.equal(made.classifier.weight, classifier.classifier.weight)
    assert not torch.equal(first(made), first(classifier))
    start("classifier", *words, "--freeze", "embeddings", "encoder", "--rate", 1e-3, "--epochs", 1)
    made = BertForSequenceClassification.from_pretrained(tmp_path / "made")
    assert not torch.equal(made.classifier.weight, classifier.classifier.weight)
    assert torch.equal(first(made), first(classifier))


def test_encoders_are_measured_with_and_without_channels(start, classifier, tmp_path, capsys):
    rows = [{"text": f"word{i} word{i % 7}", "label": i % 2} for i in range(24)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    start("encoder_channels", tmp_path / "m", file, file, "--keep", 0.6, "--samples", 8)
    printed = capsys.readouterr().out
    assert "keep 0.6, with channels: " in printed
    assert "keep 0.6, without: " in printed
