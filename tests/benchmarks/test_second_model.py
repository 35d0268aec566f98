"""A second model is trained, compressed and measured."""

from __future__ import annotations

import importlib
import json
import re


def test_a_second_model_is_trained_and_measured_by_draws(
    start, python_pieces, monkeypatch, tmp_path
):
    options = ["second_model", "--steps", 2, "--windows", 2, "--num-samples", 4]
    options += ["--scheme", "svd-llm", "svd", "--keep-targets", 0.6, "--seeds", 0, 1]
    options += ["--gradient-samples", 2, "--out", tmp_path / "out"]
    start(*options)
    found = json.loads((tmp_path / "out" / "second_model.json").read_text())
    assert [row["scheme"] for row in found["rows"]] == [
        "dense",
        *("svd-llm:seed=0", "svd-llm:seed=1", "svd"),
    ]
    assert found["unigram"] > 1
    assert found["trained_tokens"] == 2 * 2 * 16
    assert all(row["held-out text"] > 1 for row in found["rows"])
    text = (tmp_path / "out" / "second_model.md").read_text()
    assert re.search(r"\| `svd-llm` \| 0.6 \| [\d.]+ ± [\d.]+ \(", text)
    monkeypatch.setattr(python_pieces, "train", None)  # it is not called again
    monkeypatch.setattr("tnlm.compress", None)  # neither is this
    start(*options)
    assert json.loads((tmp_path / "out" / "second_model.json").read_text()) == found
    options[options.index("svd-llm") : options.index("--keep-targets")] = ["svd"]
    start(*options)  # of what is measured already, the part that is asked for
    fewer = json.loads((tmp_path / "out" / "second_model.json").read_text())
    assert fewer["rows"] == [found["rows"][0], found["rows"][-1]]


def test_a_third_model_is_a_mixture_whose_experts_are_targets(start, python_pieces, tmp_path):
    options = ["second_model", "--model", "mixture", "--steps", 2, "--windows", 2]
    start(*options, "--scheme", "svd", "--keep-targets", 0.6, "--out", tmp_path)
    found = json.loads((tmp_path / "third_model.json").read_text())
    dense, svd = found["rows"]
    assert svd["parameters"] < 0.7 * dense["parameters"]  # attention alone would leave 0.95
    assert re.search(r"\| `svd` \| 0.6 \| ", (tmp_path / "third_model.md").read_text())


def test_models_of_other_configurations_or_training_have_other_folders(python_pieces, monkeypatch):
    second, folders = importlib.import_module("second_model"), []
    monkeypatch.setattr(second, "WINDOW", 16)

    def trained(**changes):
        def make():
            model = second.make_model()
            model.config.update(changes)
            return model

        folders.append(python_pieces.trained("gpt2", make, 1)[2])

    trained()
    trained()
    trained(layer_norm_epsilon=1e-6)
    monkeypatch.setattr(python_pieces, "RATE", 1e-3)
    trained()
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
