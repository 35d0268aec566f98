"""A mixture of experts is trained, compressed and timed."""

from __future__ import annotations

import contextlib
import importlib
import json
import runpy

import pytest
import torch

from tests.benchmarks.conftest import BENCHMARKS


def test_the_mixture_is_trained_once_and_measured(start, python_pieces, monkeypatch, tmp_path):
    start("mixture", "--steps", 2, "--windows", 4, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "mixture.json").read_text())
    assert found["parameters"] > found["expert_parameters"] > 0
    assert found["perplexity"] > 1
    assert len(found["routing"]) == 4
    for row in found["routing"]:
        assert 0 <= row["least"] <= 1 / 8 <= row["largest"] <= 1
        assert 1 <= row["effective"] <= 8.001
    assert "held-out perplexity" in (tmp_path / "out" / "mixture.md").read_text()
    monkeypatch.setattr(python_pieces, "train", None)  # it is not called again
    start("mixture", "--steps", 2, "--windows", 4, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "mixture.json").read_text()) == found


@pytest.mark.usefixtures("python_pieces")
def test_training_the_mixture_goes_on_where_it_stopped(monkeypatch, tmp_path):
    losses, mixture = {}, importlib.import_module("mixture_model")
    for name, stops in (("whole", ()), ("stopped", (4,))):
        monkeypatch.setenv("TNLM_HOME", str(tmp_path / name))
        real, calls = torch.nn.utils.clip_grad_norm_, []

        def clip(*given, real=real, calls=calls, stops=stops):
            calls.append(given)
            if len(calls) in stops:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        with pytest.raises(KeyboardInterrupt) if stops else contextlib.nullcontext():
            mixture.trained_mixture(5)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", real)
        _, _, folder = mixture.trained_mixture(5)
        losses[name] = json.loads((folder / "training_loss.json").read_text())
        assert not (folder / "partial.pt").exists()
    assert losses["stopped"] == losses["whole"]


def test_methods_for_experts_are_compared_and_resumed(start, python_pieces, monkeypatch, tmp_path):
    monkeypatch.setattr(python_pieces, "WINDOW", 32)
    options = ["mixture_methods", "--steps", 1, "--windows", 2, "--out", tmp_path / "out"]
    options += ["--scheme", "reap", "--keep-targets", 0.5]
    start(*options)
    rows = json.loads((tmp_path / "out" / "mixture_methods.json").read_text())["rows"]
    assert [row["scheme"] for row in rows] == ["dense", "reap"]
    assert rows[1]["keep_targets"] == 0.5
    assert all(len(row["losses"]) == 2 for row in rows)
    assert "| reap | 0.500 |" in (tmp_path / "out" / "mixture_methods.md").read_text()
    monkeypatch.setattr("tnlm.compress", None)  # it is not called again
    start(*options)
    assert json.loads((tmp_path / "out" / "mixture_methods.json").read_text())["rows"] == rows


def test_experts_are_decoded_beside_the_dense_ones(tmp_path):
    module = runpy.run_path(str(BENCHMARKS / "experts.py"))
    sizes = "--hidden 16 --inner 24 --experts 4 --tokens 1 3 --rounds 2"
    rows = module["main"]([str(tmp_path), *sizes.split()])
    assert [row["tokens"] for row in rows] == [1, 3]
    assert all(row[way] > 0 for row in rows for way in ("eager", "grouped_mm", "factored"))
    assert (tmp_path / "experts.jsonl").read_text().count("\n") == 2
