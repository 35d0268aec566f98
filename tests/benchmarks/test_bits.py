"""Bits and structure are compared on a model off the grid."""

from __future__ import annotations


def test_bits_and_structure_are_compared_off_the_grid_and_resumed(
    start, tiny_llama, word_tokenizer, word_text, monkeypatch, tmp_path
):
    tiny_llama(tie_word_embeddings=True, max_position_embeddings=512).save_pretrained(
        tmp_path / "m"
    )
    word_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text(word_text(900))
    start("off_grid", tmp_path / "m", tmp_path / "rotated")
    options = ["bits", tmp_path / "rotated", tmp_path / "out", "--text", f"t={tmp_path}/text.txt"]
    options += ["--calibration", tmp_path / "text.txt", "--recipe", "dense", "rtn:precision=int4"]
    start(*options)
    text = (tmp_path / "out" / "bits.md").read_text()
    assert "| rtn:precision=int4 | 0.279 | 1.000 |" in text
    monkeypatch.setattr("tnlm.compress", None)  # it is not called again
    start(*options)
    assert (tmp_path / "out" / "bits.md").read_text() == text
