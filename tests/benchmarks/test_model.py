"""Whole models are timed, measured and predicted."""

from __future__ import annotations

import json

import pytest

import tnlm


def test_model_measures_a_real_and_a_random_model(run, tmp_path, tiny_llama):
    tiny_llama(seed=0).save_pretrained(tmp_path / "tiny")
    sizes = "--hidden 32 --intermediate 48 --layers 1 --prompt-tokens 8 --new-tokens 2"
    options = [*sizes.split(), "--keep-targets", 0.6, "--dtypes", "float32", "bfloat16"]
    figures, text = run("model", tmp_path / "tiny", *options)
    rows = figures["models"]
    assert len(rows) == 2 * 2 * 2  # models, dtypes, variants
    for row in rows:
        assert row["prefill_speed"] > 0
        assert row["decode_speed"] > 0
        assert (row["share_of_bytes"] < 1) == (row["variant"] != "dense")
    full, half = (row["weight_bytes"] for row in rows[:3:2])
    assert full == 2 * half
    assert "| tiny | bfloat16 |" in text


def test_model_adds_its_rows_to_those_of_other_machines(run, tmp_path, tiny_llama):
    tiny_llama(seed=0).save_pretrained(tmp_path / "tiny")
    small = tnlm.compress(tiny_llama(seed=0), "svd", keep_targets=0.4, progress=False)
    tnlm.save(small, tmp_path / "small")
    options = ["--models", "real", "--prompt-tokens", 8, "--new-tokens", 2, "--dtypes", "float32"]
    options += ["--keep-targets", 0.6, "--compressed", f"smaller={tmp_path / 'small'}"]
    (tmp_path / "out").mkdir()
    case = {"model": "tiny", "dtype": "float32", "variant": "dense", "decode_speed": 1.0}
    far = {"processor": "far", "threads": 1, "torch": "9"}
    sizes = {"weight_bytes": 8, "share_of_bytes": 1.0, "prefill_speed": 1.0}
    sizes |= dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"), 1.0)
    (tmp_path / "out" / "model.json").write_text(
        json.dumps({"machine": far, "models": [case | sizes]})
    )
    for _ in range(2):  # the second run replaces the rows of the first
        figures, text = run("model", tmp_path / "tiny", *options)
        rows = figures["models"]
        found = [(row["machine"].startswith("far,"), row["variant"]) for row in rows]
        new = [(False, name) for name in ("dense", "low rank, 0.6 kept", "smaller")]
        assert found == [(True, "dense"), *new]
    assert "| far, 1 thread, torch 9 | tiny | float32 | dense | 0 | 1.000 |" in text


def test_predicted_compares_every_variant_with_dense(run):
    options = "--widths 192 --layers 1 --keep-targets 0.6 --prefill 8 --dtypes float32"
    figures, text = run("predicted", *options.split())
    rows = figures["rows"]
    assert len(rows) == 2 * 4  # passes, variants
    dense, low_rank, *_ = (row for row in rows if row["pass"] == "decode")
    assert dense["off"] == 0
    gained = dense["layers"] - low_rank["layers"]
    assert low_rank["predicted"] == pytest.approx(dense["measured"] - gained)
    assert "| 192, 1 blocks | float32 | prefill 8 | Kronecker sum, 0.6 |" in text
