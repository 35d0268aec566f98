"""Schemes are compared on one model."""

from __future__ import annotations

import importlib

import tnlm
from tnlm.errors import BudgetError


def test_the_short_table_of_quality_joins_draws_and_names_the_model():
    quality = importlib.import_module("quality")
    rows = [
        {"scheme": "dense", "asked": 1.0, "wiki": 10.0, "parameters": 9, "total_seconds": 0.0},
        {"scheme": "auto", "asked": 0.8, "wiki": 11.0},
        {"scheme": "dense", "asked": 1.0, "wiki": 10.0, "parameters": 9, "total_seconds": 0.0},
        {"scheme": "auto:seed=1", "asked": 0.8, "wiki": 13.0},
        {"scheme": "svd-llm:damping=0.1,seed=1", "asked": 0.8, "wiki": 15.0},
        {"scheme": "svd", "asked": 0.8, "wiki": 1e9},
        {"scheme": "tt", "asked": 0.8, "error": "ValueError"},
    ]
    first, _, _, _, *table = quality._readme(rows, "models/tiny").splitlines()
    assert first == "tiny; perplexity of the dense model: 10.0 on wiki."
    assert table == [
        "| `auto` | 0.8 | 1.200 ± 0.141 (1.100 to 1.300) |",
        "| `svd-llm:damping=0.1` | 0.8 | 1.500 |",
        "| `svd` | 0.8 | destroyed |",
        "| `tt` | 0.8 | failed |",
    ]


def test_a_scheme_that_fails_is_a_row_and_the_others_go_on(
    tiny_llama, word_tokenizer, word_text, monkeypatch, tmp_path
):
    quality = importlib.import_module("quality")
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(word_text(128))
    real = tnlm.compress

    def compress(model, scheme, **given):
        if scheme == "kron":
            raise BudgetError("nothing fits", argument="keep_targets")
        return real(model, scheme, **given)

    monkeypatch.setattr(tnlm, "compress", compress)
    words = [tmp_path / "m", tmp_path / "out", "--together", "--scheme", "kron", "svd"]
    words += ["--keep-targets", 0.6, "--window", 16, "--windows", 2]
    words += ["--calibration", tmp_path / "text.txt", "--text", f"t={tmp_path}/text.txt"]
    rows = quality.main([str(word) for word in words])
    assert [row["scheme"] for row in rows] == ["dense", "kron", "svd"]
    error = "tnlm.errors.BudgetError: nothing fits"
    assert rows[1] == {"scheme": "kron", "asked": 0.6, "error": error}
    assert rows[2]["t"] > 1
