"""Two weightings are compared group by group."""

from __future__ import annotations

import json


def test_groups_compares_both_weightings(start, tiny_llama, word_tokenizer, word_text, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(word_text(600, seed=1))
    sources = ("--text", text, "--calibration", text, "--window", 32, "--windows", 2)
    start("groups", tmp_path / "m", *sources, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "groups.json").read_text())["weightings"]
    assert list(found) == ["svd", "fwsvd"]
    assert all(len(each["rows"]) == 10 for each in found.values())
    table = (tmp_path / "out" / "groups.md").read_text()
    assert "| 10 |" in table
    assert "Rank correlation of error and loss over the groups: svd " in table
