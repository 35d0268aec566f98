"""What `auto` made is trained and measured again."""

from __future__ import annotations

import json

import pytest

import tnlm


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_healing_trains_what_auto_made(start, tiny_llama, word_tokenizer, word_text, tmp_path):
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(word_text(1200, seed=1))
    start(
        *("healing", tmp_path / "m", tmp_path / "out", "--calibration", text, "--training", text),
        *("--text", f"own={text}", "--keep-targets", 0.6, "--how", "lora", "distill", "finetune"),
        *("--tokens", 256, "--max-length", 64, "--windows", 1),
    )
    found = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert [row["how"] for row in found] == ["dense", "none", "lora", "distill", "finetune"]
    assert all(row["own"] > 1 for row in found)
    table = (tmp_path / "out" / "healing.md").read_text()
    assert "| 0.6 | lora | 256 |" in table
    assert "%" in table
    assert tnlm.report(tmp_path / "out" / "distill-0.6").plan.scheme == "auto"
