"""Fits are timed beside those of other libraries."""

from __future__ import annotations


def test_fit_measures_every_format_beside_its_rivals(run):
    figures, text = run("fit", "--shapes", "24x36")
    rows = figures["fits"]
    assert {row["format"] for row in rows} == {"low-rank", "kronecker", "tensor-train", "tucker"}
    for name in ("low-rank", "kronecker", "tensor-train", "tucker"):
        ours, *others = [row for row in rows if row["format"] == name and "error" not in row]
        assert ours["by"] == "tnlm"
        assert others
        for row in others:
            assert row["ours_is_faster"] > 0
            assert ours["relative_error"] <= row["relative_error"] * 1.001
    assert "| 24x36 | kronecker | tensorly |" in text
