"""The intrinsic dimension is measured, in both ways of training."""

from __future__ import annotations

import json

import pytest


def test_intrinsic_measures_every_kind_and_resumes(start, classifier, tmp_path):
    rows = [{"text": f"word{i % 2} word{i}", "label": i % 2} for i in range(32)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sizes = "--dims 50 400 --steps 12 --learning-rate 3e-2 --batch-size 8 --max-length 8"
    sizes += " --freeze word_embeddings"
    words = ("intrinsic", tmp_path / "m", file, file, tmp_path / "out", *sizes.split())
    start(*words)
    found = json.loads((tmp_path / "out" / "intrinsic.json").read_text())["kinds"]
    assert list(found) == ["did", "said"]
    assert all(len(each["runs"]) == 6 for each in found.values())
    assert all(each["dimension"] in (50, 400) for each in found.values())
    whole = classifier.num_parameters()
    assert all(each["parameters"] < whole for each in found.values())
    table = (tmp_path / "out" / "intrinsic.md").read_text()
    assert "| did |" in table
    journal = tmp_path / "out" / "said" / "intrinsic.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-2]) + "\n")  # as if the run had been killed
    start(*words)
    assert journal.read_text().splitlines() == lines


@pytest.mark.usefixtures("classifier")
def test_intrinsic_keeps_the_scores_where_no_size_is_enough(start, tmp_path, monkeypatch):
    monkeypatch.setattr("tnlm.studies.analysis.goals.Goal.met", lambda goal, score: False)
    rows = [{"text": f"word{i % 2} word{i}", "label": i % 2} for i in range(32)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    sizes = "--dims 1 2 --steps 4 --learning-rate 1e-2 --batch-size 8 --max-length 8 --kinds did"
    start("intrinsic", tmp_path / "m", file, file, tmp_path / "out", *sizes.split())
    found = json.loads((tmp_path / "out" / "intrinsic.json").read_text())["kinds"]["did"]
    assert found["dimension"] is None
    assert len(found["runs"]) == 6
    assert "| > 2 | 3 to > 2 |" in (tmp_path / "out" / "intrinsic.md").read_text()
