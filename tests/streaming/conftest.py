"""A model's directory, and the files of a result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tnlm


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.fixture
def both(tmp_path):
    """Compress a model in memory and from files; return the two directories."""

    def run(model, scheme, **choices):
        source, folders = tmp_path / "model", (tmp_path / "memory", tmp_path / "files")
        model.save_pretrained(source)
        loaded = type(model).from_pretrained(source, dtype="auto")
        tnlm.save(tnlm.compress(loaded, scheme, progress=False, **choices), folders[0])
        tnlm.compress_files(source, folders[1], scheme, progress=False, **choices)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["files", "memory", "model"]
        return folders

    return run


@pytest.fixture
def same():
    """Compare two directories: all tensors bit by bit, the config, and the plan."""

    def check(first, second):
        expected, found = tensors(first), tensors(second)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype
            assert torch.equal(tensor, found[name]), name
        assert (first / "config.json").read_text() == (second / "config.json").read_text()
        assert tnlm.report(first).plan == tnlm.report(second).plan

    return check
