"""When statistics are read from a cache, and when they are gathered again."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from tests.calibration.test_statistics import (
    BATCHES,
    IDS,
    UP,
    assert_close,
    direct,
    gather,
    moments,
)
from tnlm.calibration import opening, statistics, store
from tnlm.calibration.data import token_batches
from tnlm.calibration.statistics import Statistics


@pytest.fixture
def forward_fails(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a forward pass ran")

    return lambda: monkeypatch.setattr(statistics, "stream", fail)


def test_a_cache_hit_needs_no_forward_pass(make_model, tmp_path, forward_fails):
    first = gather(make_model("llama"), cache_dir=tmp_path / "cache")
    expected = moments(gather(make_model("llama")))
    forward_fails()
    again = gather(make_model("llama"), cache_dir=tmp_path / "cache")
    for which in ("mean", "magnitude"):
        assert torch.equal(again.tensor(UP, which), first.tensor(UP, which))
    for found in (first, again):
        assert found.tokens == 160
        assert found.leaders == first.leaders
        assert all(torch.equal(found.moment(name), expected[name]) for name in expected)


def change_weight(model):
    model.model.norm.weight.data[0] += 1e-6


def change_config(model):
    model.config.rms_norm_eps = 0.1


@pytest.mark.parametrize(
    ("change", "batches", "modules"),
    [
        (change_weight, BATCHES, [UP]),
        (change_config, BATCHES, [UP]),
        (lambda model: model.to(torch.bfloat16), BATCHES, [UP]),
        (lambda model: None, token_batches(IDS + 1 - (IDS > 62).int(), max_length=32), [UP]),
        (lambda model: None, token_batches(IDS, max_length=16), [UP]),
        (lambda model: None, BATCHES, [UP.replace("up", "down")]),
    ],
    ids=["weight", "config", "dtype", "text", "windows", "modules"],
)
def test_whatever_changes_the_moments_misses_the_cache(
    change, batches, modules, make_model, tmp_path, forward_fails
):
    gather(make_model("llama"), modules=[UP], cache_dir=tmp_path)
    model = make_model("llama")
    change(model)
    forward_fails()
    with pytest.raises(AssertionError, match="a forward pass ran"):
        gather(model, batches, modules, cache_dir=tmp_path)


def test_where_a_model_was_loaded_from_does_not_matter(make_model, tmp_path, forward_fails):
    gather(make_model("llama"), modules=[UP], cache_dir=tmp_path / "cache")
    make_model("llama").save_pretrained(tmp_path / "model")
    model = type(make_model("llama")).from_pretrained(tmp_path / "model")
    forward_fails()
    gather(model, modules=[UP], cache_dir=tmp_path / "cache")


def test_a_cache_of_another_layout_is_left_alone(make_model, tmp_path, monkeypatch, forward_fails):
    monkeypatch.setattr(opening, "VERSION", opening.WHOLE - 1)
    gather(make_model("llama"), modules=[UP], cache_dir=tmp_path)
    monkeypatch.undo()
    forward_fails()
    with pytest.raises(AssertionError, match="a forward pass ran"):
        gather(make_model("llama"), modules=[UP], cache_dir=tmp_path)


def test_a_cache_of_whole_matrices_is_read(make_model, tmp_path, monkeypatch, forward_fails):
    with monkeypatch.context() as before:
        before.setattr(opening, "VERSION", opening.WHOLE)
        before.setattr(store, "HALVES", {})
        gather(make_model("llama"), modules=[UP], cache_dir=tmp_path)
    forward_fails()
    moment = gather(make_model("llama"), modules=[UP], cache_dir=tmp_path).moment(UP)
    assert_close(moment.tril(), direct(make_model("llama"), UP).tril())


def test_matrices_are_stored_by_half(make_model, tmp_path):
    found = gather(make_model("llama"), modules=[UP], cache_dir=tmp_path)
    (size,) = (path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert size < 33 * 16 * 4 + (3 * 32 + 1) * 8 + 600  # and the header
    assert found.names(UP) == ("count", "magnitude", "mean", "moment")


def test_an_interrupted_cache_is_filled_again(make_model, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    expected = moments(gather(make_model("llama")))
    with monkeypatch.context() as patch:
        patch.setattr(Statistics, "save_index", stop)
        with pytest.raises(KeyboardInterrupt):
            gather(make_model("llama"), cache_dir=tmp_path)
    found = gather(make_model("llama"), cache_dir=tmp_path)
    assert all(torch.equal(found.moment(name), expected[name]) for name in expected)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tokens": 3}'])
def test_a_broken_cache_is_filled_again(text, make_model, tmp_path):
    expected = moments(gather(make_model("llama"), modules=[UP], cache_dir=tmp_path))
    [index] = tmp_path.glob("*/index.json")
    index.write_text(text)
    found = gather(make_model("llama"), modules=[UP], cache_dir=tmp_path)
    assert torch.equal(found.moment(UP), expected[UP])
    assert json.loads(index.read_text())["tokens"] == 160


def test_scalars_and_flags_in_the_model_can_be_hashed(make_model, tmp_path):
    model = make_model("llama")
    model.register_buffer("scale", torch.tensor(1.0))
    model.register_buffer("flag", torch.tensor(True))
    model.temperature = nn.Parameter(torch.tensor(2.0))
    model.empty = nn.Parameter(torch.empty(0))
    gather(model, modules=[UP], cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*/index.json"))) == 1
