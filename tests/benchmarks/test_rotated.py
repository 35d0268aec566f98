"""Bases of the residual stream are compared."""

from __future__ import annotations

import json


def test_bases_of_the_stream_are_compared_and_resumed(
    start, tiny_llama, word_tokenizer, word_text, monkeypatch, capsys, tmp_path
):
    tiny_llama(tie_word_embeddings=True, num_hidden_layers=1).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(word_text(400))
    options = ["rotated", tmp_path / "m", tmp_path / "out", "--text", f"t={tmp_path}/text.txt"]
    options += ["--calibration", tmp_path / "text.txt", "--window", 32, "--windows", 2]
    start(*options)
    rows = [json.loads(line) for line in (tmp_path / "out/rotated.jsonl").read_text().splitlines()]
    assert [row["basis"] for row in rows] == ["own", "principal", "procrustes", "low-rank"]
    assert rows[2]["errors"] == sorted(rows[2]["errors"], reverse=True)
    text = capsys.readouterr().out
    monkeypatch.setattr("tnlm.rotate", None)  # it is not called again
    start(*options)
    assert capsys.readouterr().out == text
