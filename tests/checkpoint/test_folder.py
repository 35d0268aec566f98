from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tnlm.checkpoint.folder import INDEX, WEIGHTS, file_of, read_headers, weight_files
from tnlm.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    save_file({"a": torch.ones(2, 3), "b": torch.ones(1).half()}, made / "one.safetensors")
    save_file({"c": torch.arange(3)}, made / "two.safetensors")
    return made


def index(folder, listed, **fields):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed, **fields}))


SOUND = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


def test_headers_say_what_files_hold(folder):
    index(folder, SOUND)
    files, listed = weight_files(folder)
    found = read_headers(files, listed)
    assert [(n, one.dtype, one.shape) for n, one in sorted(found.items())] == [
        ("a", "F32", (2, 3)),
        ("b", "F16", (1,)),
        ("c", "I64", (3,)),
    ]


def test_one_file_comes_before_an_index(folder):
    index(folder, {"a": "../away.safetensors"})
    (folder / "one.safetensors").rename(folder / WEIGHTS)
    assert weight_files(folder) == ([folder / WEIGHTS], {})


def test_a_variant_has_names_of_its_own(folder):
    (folder / "one.safetensors").rename(folder / "model.fp16.safetensors")
    assert weight_files(folder, "fp16")[0] == [folder / "model.fp16.safetensors"]
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        weight_files(folder)


PLACES = ["../away.safetensors", "/etc/a.safetensors", "a/b.safetensors", "..", "", "x.bin", 3,
          None, "x\0.safetensors", "nothing.safetensors", "a\\b.safetensors",
          ["one.safetensors"]]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_an_index_names_files_in_its_directory(place, folder, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "away.safetensors")
    index(folder, {**SOUND, "a": place})
    with pytest.raises(CheckpointError):
        weight_files(folder)


@pytest.mark.parametrize("broken", [{"weight_map": {}}, {"weight_map": [1]}, {"metadata": None}])
def test_an_index_has_a_map_and_metadata(broken, folder):
    index(folder, SOUND, **broken)
    with pytest.raises(CheckpointError, match="is not an index"):
        weight_files(folder)


@pytest.mark.parametrize(
    "listed", [{**SOUND, "a": "two.safetensors"}, {**SOUND, "d": "one.safetensors"}]
)
def test_an_index_agrees_with_its_files(listed, folder):
    index(folder, listed)
    with pytest.raises(CheckpointError, match=r"the index is wrong about [ad]"):
        read_headers(*weight_files(folder))


def test_a_tensor_lies_in_one_file(folder):
    save_file({"a": torch.ones(2, 3)}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in one\.safetensors and in two\.safetensors"):
        read_headers([folder / "one.safetensors", folder / "two.safetensors"])


def test_links_stay_in_the_directory(folder, tmp_path):
    (folder / "link.safetensors").symlink_to("one.safetensors")
    assert file_of(folder, "link.safetensors").exists()
    (tmp_path / "away").write_text("secret")
    for target in (tmp_path / "away", "../away"):
        (folder / "out").unlink(missing_ok=True)
        (folder / "out").symlink_to(target)
        with pytest.raises(CheckpointError, match="leads out of the directory"):
            file_of(folder, "out")
    (tmp_path / "other").symlink_to(folder)  # the directory itself may be a link
    assert file_of(tmp_path / "other", "link.safetensors").exists()


def test_links_of_the_hubs_cache_lead_to_its_blobs(tmp_path):
    blobs, snapshot = (
        tmp_path / "models--a--b" / "blobs",
        tmp_path / "models--a--b" / "snapshots" / "c",
    )
    blobs.mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    (blobs / "f00").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/f00")
    assert file_of(snapshot, "config.json").exists()
    assert file_of(snapshot / "sub", "config.json").exists()
    (tmp_path / "f00").write_text("{}")
    (snapshot / "out.json").symlink_to("../../../f00")
    with pytest.raises(CheckpointError, match="leads out"):
        file_of(snapshot, "out.json")


def test_what_is_no_ordinary_file_is_not_read(folder):
    os.mkfifo(folder / "pipe")
    (folder / "dir").mkdir()
    (folder / "loop").symlink_to("loop")
    for name in ("pipe", "dir", "loop", "nothing"):
        with pytest.raises(CheckpointError, match=name):
            file_of(folder, name)
