"""A table of quality is drawn."""

from __future__ import annotations

import json


def test_the_picture_draws_the_table(start, tmp_path):
    rows = [
        {"scheme": "dense", "parameters": 10**6, "wiki": 5.0},
        {"scheme": "svd", "parameters": 8 * 10**5, "wiki": 9.0},
        {"scheme": "svd", "parameters": 5 * 10**5, "wiki": 900.0},
        {"scheme": "kron", "error": "RankError"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    start("picture", tmp_path / "rows.json", tmp_path / "new" / "picture.svg")
    assert "<svg" in (tmp_path / "new" / "picture.svg").read_text()
