"""Files are written whole or not at all, and never in place of a device."""

from __future__ import annotations

import os

import pytest

from tnlm.errors import CheckpointError
from tnlm.utils.files import check_file, save_text


def test_a_file_that_cannot_be_is_refused_early_and_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "no" / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=f"^{path} cannot be written: "):
            check_file(path)
        with pytest.raises(CheckpointError, match=f"^{path} cannot be written: "):
            save_text(path, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    save_text(file, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_permissions(mode, tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    file.chmod(mode)
    link.symlink_to(file)
    for path in (file, link):
        save_text(path, "new")
        assert file.stat().st_mode & 0o777 == mode


def test_a_pipe_is_written_into_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_file(pipe)
        save_text(pipe, "text")
        assert os.read(reader, 10) == b"text"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
