"""Single layers are timed: every format, its rivals, and the overhead of a call."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

from tnlm.decompositions import get_format
from tnlm.tensors.gauge import fix


def test_layers_measures_every_format_beside_dense(run):
    options = "--shapes 24x36 --keep-targets 0.5 --tokens 1 3 --dtypes float32 bfloat16"
    figures, text = run("layers", *options.split())
    rows = figures["layers"]
    ours = [row for row in rows if row["by"] == "tnlm"]
    assert len(ours) == 6 * 2 * 2  # formats, tokens, dtypes
    assert len([row for row in rows if row["by"] == "dense"]) == len(ours)
    for row in ours:
        assert row["speed"] > 0
        assert 0 < row["macs"] <= 1
        assert row["keep"] is None or row["macs"] <= row["keep"]
    assert {row["by"] for row in rows} >= {"PEFT LoKr", "linear_operator", "tltorch, rebuilt"}
    assert "### 24x36, bfloat16" in text
    saved = figures["saved_for_backward"]
    assert 0 < saved["tnlm"] < saved["one einsum"]


@pytest.mark.parametrize("missing", ["tltorch", "peft", "linear_operator"])
def test_a_library_that_is_missing_is_said_to_be(run, monkeypatch, missing):
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    options = "--shapes 8x8 --formats tucker kronecker-term --keep-targets 0.8 --tokens 1"
    _, text = run("layers", *options.split(), "--dtypes", "float32")
    label = "PEFT LoKr" if missing == "peft" else missing
    lines = [line for line in text.splitlines() if label in line]
    assert lines
    assert all("not installed" in line for line in lines)


def test_saved_bytes_counts_activations_once_and_no_weights():
    layers = importlib.import_module("layers")
    layer = nn.Linear(6, 4, bias=False)
    x = torch.randn(5, 6, requires_grad=True)
    saved = layers.saved_bytes(lambda: layer(x) + layer(x), list(layer.parameters()))
    assert saved == 4 * x.numel()


def test_random_factors_are_what_a_fit_would_store(gaussian):
    random_layers = importlib.import_module("random_layers")
    for name in ("low-rank", "kronecker"):
        spec = random_layers.spec_within(name, (24, 16), 0.6)
        network = get_format(name).network((24, 16), spec)
        full = {factor: gaussian(*network.shape_of(factor)) for factor in network.factors}
        fitted, drawn = fix(network, full), random_layers.random_factors(network)
        assert {k: v.shape for k, v in drawn.items()} == {k: v.shape for k, v in fitted.items()}
        order = drawn[f"{network.gauge.factor}_order"]
        assert order.dtype == torch.int64
        assert order.sort().values.tolist() == list(range(network.gauge_rows))


def test_turns_alternate_and_go_through_all_calls():
    timing = importlib.import_module("timing")
    made: list[str] = []
    calls = {
        "a": [lambda k=k: made.append(f"a{k}") for k in range(3)],
        "b": [lambda: made.append("b")],
    }
    times = timing.take_turns(calls, repeats=2)
    assert {name: len(spent) for name, spent in times.items()} == {"a": 2, "b": 2}
    assert made == ["a0", "a2", "b", "b", *["a0", "a1", "a2", "b"] * 2]


def test_overhead_is_measured_in_cache_and_from_memory(run):
    figures, text = run("overhead", "--shapes", "24x16", "--keep-targets", 0.5, "--bytes", 9000)
    cases = [(row["dtype"], row["from"]) for row in figures["rows"]]
    assert cases == [(d, f) for d in ("float32", "bfloat16") for f in ("cache", "memory")]
    assert all(row["ratio"] > 0 for row in figures["rows"])
    assert "| float32 | 24x16 | 0.5 | cache |" in text
