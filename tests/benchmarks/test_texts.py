"""The texts that benchmarks learn from and are measured on."""

from __future__ import annotations

import json


def test_texts_mixes_wikitext_with_documents_that_are_not_measured_on(start, tmp_path):
    (tmp_path / "wiki.txt").write_text("a wiki page " * 1000)
    documents = [json.dumps({"text": f"document {i} " * 200}) for i in range(12)]
    (tmp_path / "c4.jsonl").write_text("\n".join(documents))
    given = ("--wiki", tmp_path / "wiki.txt", "--c4", tmp_path / "c4.jsonl")
    start("texts", tmp_path / "out", *given, "--skip", 9)
    lines = (tmp_path / "out" / "mixture.jsonl").read_text().splitlines()
    mixed = [json.loads(line)["text"] for line in lines]
    assert [text[:11] for text in mixed if text.startswith("document")] == [
        "document 9 ",
        "document 10",
        "document 11",
    ]
    wiki = sum(len(text) for text in mixed if "wiki" in text)
    assert 0.8 < wiki / sum(len(text) for text in mixed if "wiki" not in text) < 1.4
    assert "Assert statements" in (tmp_path / "out" / "prose.txt").read_text()
