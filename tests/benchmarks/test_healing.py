"""What `auto` made is trained and measured again."""

from __future__ import annotations

import importlib
import json

import pytest

import tnlm


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_healing_trains_what_auto_made(start, tiny_llama, word_tokenizer, word_text, tmp_path):
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(word_text(1200, seed=1))
    words = ["healing", tmp_path / "m", tmp_path / "out", "--calibration", text, "--training", text]
    words += ["--text", f"own={text}", "--keep-targets", 0.6]
    words += ["--tokens", 256, "--max-length", 64, "--windows", 1, "--how"]
    start(*words, "lora", "distill", "finetune")
    found = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert [row["how"] for row in found] == ["dense", "none", "lora", "distill", "finetune"]
    assert all(row["own"] > 1 for row in found)
    table = (tmp_path / "out" / "healing.md").read_text()
    assert "| 0.6 | lora | 256 |" in table
    assert "%" in table
    assert "rate" not in table
    assert tnlm.report(tmp_path / "out" / "distill-0.6").plan.scheme == "auto"
    start(*words, "lora", "--rate", 3e-4)  # beside the others
    rows = json.loads((tmp_path / "out" / "healing.json").read_text())
    assert rows[:-1] == found
    assert [row.get("rate") for row in rows] == [None, None, 1e-3, 2e-4, 2e-4, 3e-4]
    assert "| 0.6 | lora | 0.0003 | 256 |" in (tmp_path / "out" / "healing.md").read_text()


def test_rows_of_before_rates_were_kept_have_an_empty_cell():
    healing = importlib.import_module("healing")
    rows = [
        {"keep_targets": 1.0, "how": "dense", "tokens": 0, "own": 2.0},
        {"keep_targets": 0.6, "how": "none", "tokens": 0, "minutes": 1.0, "own": 4.0},
        {"keep_targets": 0.6, "how": "lora", "tokens": 8, "minutes": 1.0, "own": 3.0},
    ]
    assert "| of the targets | training | tokens | minutes | own |" in healing.table(rows)
    rows.append({**rows[-1], "rate": 3e-4})
    assert healing.table(rows).splitlines()[-2:] == [
        "| 0.6 | lora |  | 8 | 1 | 3.00 (-25%) |",
        "| 0.6 | lora | 0.0003 | 8 | 1 | 3.00 (-25%) |",
    ]
