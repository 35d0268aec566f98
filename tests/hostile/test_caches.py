"""Caches that were cut short, flipped or are in use: gathered again with one warning, never wrong.

The full run: pytest tests/hostile/test_caches.py -m hostile
"""

from __future__ import annotations

import logging
import random
import shutil

import pytest
import torch

import tnlm

IDS = torch.arange(256) % 61 + 3
ASKED = {"calibration": IDS, "max_length": 32, "progress": False}


def flip(path, generator):
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(data)


def cut(path, generator):
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def clear(path, generator):
    path.write_bytes(b"")


def remove(path, generator):
    path.unlink()


def replace(path, generator):
    path.unlink()
    path.mkdir()


HARMS = [flip, cut, clear, remove, replace]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def harmed(count, seed, scheme, make_model, folder, caplog):
    """Compress with a cache that was harmed, again and again; return what went wrong."""
    generator, failures = random.Random(seed), []
    expected = weights(tnlm.compress(make_model("llama"), scheme, cache_dir=folder / "0", **ASKED))
    for number in range(count):
        place = folder / "harmed"
        shutil.copytree(folder / "0", place)
        path = generator.choice(sorted(p for p in place.rglob("*.*") if p.is_file()))
        harm = generator.choice(HARMS)
        harm(path, generator)
        caplog.clear()
        found = weights(tnlm.compress(make_model("llama"), scheme, cache_dir=place, **ASKED))
        same = all(torch.equal(found[name], expected[name]) for name in expected)
        warnings = [r.message for r in caplog.records if "made again" in r.message]
        if not same or len(warnings) != 1:
            failures.append((number, harm.__name__, path.name, same, warnings))
        caplog.clear()
        tnlm.compress(make_model("llama"), scheme, cache_dir=place, **ASKED)
        warned = any(record.levelno >= logging.WARNING for record in caplog.records)
        if warned or [p.name for p in place.iterdir() if p.name.startswith(".")]:
            failures.append((number, harm.__name__, path.name, "was not mended"))
        shutil.rmtree(place)
    return failures


@pytest.mark.parametrize("count", [2, pytest.param(60, marks=pytest.mark.hostile)])
@pytest.mark.parametrize("scheme", ["svd-llm", "fwsvd"])
def test_a_harmed_cache_is_made_again(scheme, count, make_model, tmp_path, caplog):
    assert harmed(count, count, scheme, make_model, tmp_path, caplog) == []
