"""Files of a new folder get ordinary permissions where the file system has any."""

from __future__ import annotations

from pathlib import Path

import pytest

from tnlm.checkpoint.exchange import replace_directory
from tnlm.utils.folders import share


def test_all_files_below_get_the_permissions_of_an_ordinary_one(tmp_path):
    ordinary, below = tmp_path / "ordinary", tmp_path / "folder" / "below"
    below.parent.mkdir()
    for path in (ordinary, below):
        path.touch()
    below.chmod(0o600)
    ordinary.chmod(0o640)
    share(tmp_path, ordinary)
    assert below.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [PermissionError(1, "not permitted"), OSError(95, "no modes")])
def test_a_file_system_without_permissions_is_written_to(error, tmp_path, monkeypatch):
    def refused(*_):
        raise error

    monkeypatch.setattr(Path, "chmod", refused)
    replace_directory(tmp_path / "model", lambda new: (new / "config.json").write_text("{}"))
    assert (tmp_path / "model" / "config.json").read_text() == "{}"
