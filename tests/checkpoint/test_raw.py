from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tnlm.checkpoint.raw import DTYPES, places, read, write
from tnlm.errors import CheckpointError

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    **{str(dtype): torch.ones(3, dtype=dtype) for dtype in DTYPES.values()},
}


def test_files_are_read_as_safetensors_reads_them(tmp_path):
    save_file({k: t.contiguous() for k, t in TENSORS.items()}, tmp_path / "a.safetensors")
    found = places([tmp_path / "a.safetensors"])
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read(found[name]), tensor)
        assert read(found[name]).dtype == tensor.dtype


def test_files_are_written_as_safetensors_reads_them(tmp_path):
    path = tmp_path / "a.safetensors"
    sizes = write(path, TENSORS, TENSORS.items())
    found = load_file(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert sizes == {name: tensor.nbytes for name, tensor in TENSORS.items()}


def test_a_file_that_changes_later_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(100)}, path)
    place = places([path])["a"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="ends too early"):
        read(place)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        places([path])
