"""The parsers of config, index and report answer bytes of any sort, or raise errors of tnlm."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.hostile.parsing import CONFIG, parse

KEYS = [
    "quantization_config", "quant_method", "scheme", "options", "format_version", "modules",
    "parts", "format", "kind", "weight_map", "metadata", "architectures", "sha256", "metric",
    "num_layers", "attn_implementation", "transformers_weights",
]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
LEAVES |= st.sampled_from(["tnlm", "a.safetensors", "../a.safetensors", "x/y"])
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)


def sorted_out(data):
    with tempfile.TemporaryDirectory() as folder:
        parse(data, Path(folder))


@given(st.binary(max_size=64))
@example(b"[" * 100_000)
@example(CONFIG)
@example(b'{"a":' * 500 + b"1" + b"}" * 500)
def test_any_bytes(data):
    sorted_out(data)


@settings(max_examples=15)
@given(VALUES)
def test_any_json(value):
    sorted_out(json.dumps(value).encode())


@given(VALUES, st.sampled_from(["scheme", "options", "format_version", "modules"]))
def test_any_field_of_a_config(value, name):
    config = json.loads(CONFIG)
    config["quantization_config"][name] = value
    sorted_out(json.dumps(config).encode())


@pytest.mark.hostile
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed")
def test_bytes_that_atheris_chooses():
    command = [sys.executable, "-m", "tests.hostile.fuzz", "-runs=20000", "-max_total_time=60"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
