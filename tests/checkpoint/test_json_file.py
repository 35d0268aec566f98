from __future__ import annotations

import os

import pytest

from tnlm.checkpoint import json_file
from tnlm.checkpoint.json_file import DEEPEST, LARGEST, read_object, shortened
from tnlm.errors import CheckpointError

DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000
BROKEN = {
    b"": "not readable JSON",
    b"{": "not readable JSON",
    b"\xff\xfe": "not readable JSON",
    b'\xef\xbb\xbf{"a": 1}': "not readable JSON",
    b'{"a": 1, "a": 2}': "names 'a' twice",
    b'{"b": [{"a": 1, "a": 2}]}': "names 'a' twice",
    b'{"a": ' + b"9" * 5000 + b"}": "not readable JSON",
    b"[1]": r"holds \[1\], not a JSON object",
    b"null": "not a JSON object",
    DEEP.encode(): "nests deeper",
    b'{"a":' * 80 + b"1" + b"}" * 80: f"nests deeper than {DEEPEST} levels",
    b'{"a":' + b"[" * 80 + b"]" * 80 + b"}": "nests deeper",
}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_object_is_an_error(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=BROKEN[text]):
        read_object(tmp_path / "a.json")


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text(
        '{"a": {"b": [1, 2.5, null, Infinity, "é"]}}', encoding="utf-8"
    )
    assert read_object(tmp_path / "a.json") == {"a": {"b": [1, 2.5, None, float("inf"), "é"]}}


def test_a_file_may_not_be_too_large(tmp_path, monkeypatch):
    assert LARGEST == 32 * 2**20
    monkeypatch.setattr(json_file, "LARGEST", 8)
    (tmp_path / "a.json").write_text('{"a": 1111}')
    with pytest.raises(CheckpointError, match="has 11 bytes; allowed: 8"):
        read_object(tmp_path / "a.json")


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "loop", "zero", "nothing", "."):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_object(tmp_path / name)


def test_messages_stay_short():
    assert shortened("a\nb" * 10_000) == ("a b" * 100) + "..."
    assert shortened(3) == "3"
