"""Checkpoints that earlier versions wrote are read bit for bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers

import tnlm
from tnlm.checkpoint.description import FORMAT_VERSION
from tnlm.decompositions import formats

GOLDEN = Path(__file__).parent / "golden"
FOUND = sorted(path.parent.name for path in GOLDEN.glob("v*/config.json"))
spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def plainly(directory):
    config = json.loads((directory / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(directory)


@pytest.mark.parametrize("load", [tnlm.load, plainly])
@pytest.mark.parametrize("name", FOUND)
def test_a_golden_checkpoint_is_read_bit_for_bit(name, load):
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    model = load(GOLDEN / name)
    assert make.digest(model) == expected["sha256"]
    wanted = torch.tensor(expected["outputs"])
    error = (make.outputs(model).float() - wanted).norm() / wanted.norm()
    assert error < (2e-2 if model.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", FOUND)
def test_saved_again_it_is_of_this_version_and_the_same(name, tmp_path):
    again = tnlm.load(tnlm.save(tnlm.load(GOLDEN / name), tmp_path / "again"))
    assert again.config.quantization_config.format_version == FORMAT_VERSION
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    assert make.digest(again) == expected["sha256"]


def formats_of(directory):
    config = json.loads((directory / "config.json").read_text())
    for name, entry in config["quantization_config"]["modules"].items():
        narrow = "heads" if name.endswith("o_proj") else "channels"
        for part in entry.get("parts", [entry]):
            kinds = {"sliced": narrow, "narrowed": "channel-ranks", "rows": "experts"}
            yield kinds.get(part["kind"], part.get("format"))


LATER = {
    "channel-ranks",
    "cp",
    "stack-tucker",
    "expert-tucker",
    "experts",
    "heads",
    "submatrix",
}


@pytest.mark.parametrize(("version", "later"), [(2, LATER), (3, set())])
def test_every_format_has_a_golden_checkpoint(version, later):
    kept = {name for path in GOLDEN.glob(f"v{version}-*") for name in formats_of(path)}
    assert kept >= set(formats()) - later
