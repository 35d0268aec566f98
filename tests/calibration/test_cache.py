from __future__ import annotations

import errno
import os
import re

import pytest
import torch

import tnlm
from tnlm.calibration import cache
from tnlm.calibration.cache import Folder, read
from tnlm.errors import CheckpointError
from tnlm.utils.claim import PREFIX, Claim, temporary_folder

ONES = {"moment": torch.ones(3, 3, dtype=torch.float64), "count": torch.tensor(4)}


def finished(place, tensors=ONES):
    folder = Folder(place)
    folder.put("a", tensors)
    folder.finish({"tokens": 4})
    return folder


def test_what_is_not_finished_has_no_place_and_goes(tmp_path):
    folder = Folder(tmp_path / "entry")
    folder.put("a", ONES)
    assert torch.equal(folder.tensor("a", "moment"), ONES["moment"])
    assert read(tmp_path / "entry") is None
    [unfinished] = tmp_path.iterdir()
    Folder(tmp_path / "other").put("a", ONES)  # sweeps, but not what is in use
    assert unfinished.exists()
    del folder
    assert not unfinished.exists()


def test_what_a_killed_process_left_is_swept(tmp_path, monkeypatch):
    left = Claim(tmp_path)
    left.lock.close()  # as the system does
    mine = tmp_path / ".my-folder"
    mine.mkdir()
    finished(tmp_path / "entry")
    assert {path.name for path in tmp_path.iterdir()} == {".my-folder", "entry"}
    left = Claim(tmp_path)
    left.lock.close()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert [p for p in tmp_path.iterdir() if p.name.startswith(PREFIX)] == [folder.parent]


def test_two_processes_may_fill_one_entry(tmp_path, caplog):
    first, second = Folder(tmp_path / "entry"), Folder(tmp_path / "entry")
    first.put("a", ONES)
    second.put("a", {"moment": torch.zeros(1)})
    first.finish({"tokens": 4})
    second.finish({"tokens": 4})
    assert torch.equal(first.tensor("a", "moment"), ONES["moment"])
    assert torch.equal(second.tensor("a", "moment"), torch.zeros(1))
    found, about = read(tmp_path / "entry")
    assert torch.equal(found.tensor("a", "moment"), ONES["moment"])
    assert about == {"tokens": 4}
    del first, second
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]
    assert not caplog.records


def test_a_reader_goes_on_when_an_entry_is_made_again(tmp_path):
    place = tmp_path / "entry"
    finished(place)
    found, _ = read(place)
    held = found.tensor("a", "moment")
    (place / "index.json").write_text("{}")
    finished(place, {"moment": torch.zeros(1)})  # takes the place of what is broken
    assert torch.equal(held, ONES["moment"])
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        found.tensor("a", "moment")
    assert torch.equal(read(place)[0].tensor("a", "moment"), torch.zeros(1))


def test_flipped_bits_are_seen_when_an_entry_is_opened_and_when_it_is_read(tmp_path, caplog):
    place = tmp_path / "entry"
    folder = finished(place)
    path = place / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.safetensors has changed.* remove .*entry"):
        folder.tensor("a", "moment")
    assert read(place) is None
    assert re.search(r"entry is ignored, and made again: a\.safetensors has", caplog.text)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(cache, "write", full)
    with pytest.raises(CheckpointError, match=r"cache .* cannot be written: .*no space.*cache_dir"):
        Folder(tmp_path / "entry").put("a", ONES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "no permission"])
def test_a_place_that_cannot_be_a_cache_is_refused_before_any_work(
    kind, make_model, tmp_path, monkeypatch
):
    path = tmp_path / "cache"
    if kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "no permission":
        real = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: p != tmp_path and real(p, mode))
    else:
        path.write_text("mine")
    path = path / "below" if kind == "below a file" else path
    monkeypatch.setattr("tnlm.compression.gatherers.inputs.collect", None)
    with pytest.raises(CheckpointError, match=r"file|broken link|permission"):
        tnlm.compress(
            make_model("llama"), "svd-llm", calibration=torch.arange(64) % 61, cache_dir=path
        )
