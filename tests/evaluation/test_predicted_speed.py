"""Predicted speed follows the machine's prices and the path that a layer takes."""

from __future__ import annotations

import pytest
import torch

import tnlm
from tests.mixtures import make
from tnlm.errors import ModelError, OptionError
from tnlm.evaluation import predicted_speed as prediction
from tnlm.evaluation.predicted_speed import predict_speed
from tnlm.layers.machine import Machine

BY_BYTES = Machine(0.0, 0.0, (1e-9,) * 5, 0.0, (1e-15,) * 4, True)
BY_WORK = Machine(0.0, 0.0, (1e-15,) * 5, 0.0, (1e-9,) * 4, True)
BY_CALLS = Machine(1.0, 1.0, (0.0,) * 5, 0.0, (0.0,) * 4, True)


def priced(monkeypatch, prices):
    monkeypatch.setattr(prediction, "machine", lambda *asked: prices)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_where_only_multiply_adds_count_their_ratio_is_the_speed(kind, compressed, monkeypatch):
    priced(monkeypatch, BY_WORK)
    model = compressed(kind, "svd")
    plan = tnlm.report(model).plan
    gain = plan.targets_before.macs / plan.targets_after.macs
    assert predict_speed(model, [1])[1] == pytest.approx(gain)


def test_many_small_products_are_slower(compressed, monkeypatch):
    priced(monkeypatch, BY_CALLS)
    # Two products, and two or three operations for the identity block.
    assert 1 / 5 <= predict_speed(compressed("llama", "svd"), [1])[1] <= 1 / 4


def test_fewer_channels_are_faster_by_what_they_drop(compressed, monkeypatch):
    priced(monkeypatch, BY_BYTES)
    model = compressed("llama", "modegpt", keep_targets=0.5)
    found = predict_speed(model, (1, 64))
    assert found[1] > 1.5
    assert found.keys() == {1, 64}


def test_rows_and_columns_that_were_removed_are_not_multiplied(make_model, monkeypatch):
    own = tnlm.scheme("llm-surgeon", metric="identity", allocation="uniform")
    model = tnlm.compress(make_model("llama"), own, keep_targets=0.5, progress=False)
    priced(monkeypatch, BY_WORK)
    plan = tnlm.report(model).plan
    gain = plan.targets_before.macs / plan.targets_after.macs
    assert predict_speed(model, [64])[64] == pytest.approx(gain, rel=0.05)
    priced(monkeypatch, BY_CALLS)
    assert 1 / 4 <= predict_speed(model, [1])[1] < 1  # beside the product, inputs and outputs


def test_a_rebuilt_weight_is_never_slower_than_dense(compressed, monkeypatch):
    priced(monkeypatch, BY_WORK)
    model = compressed("llama", "kron", terms=6, max_macs=9.0)
    slow = predict_speed(model, [4096])[4096]
    tnlm.keep_rebuilt(model, 2**30)
    assert slow < predict_speed(model, [4096])[4096]
    assert predict_speed(model, [4096])[4096] >= 1.0  # some layers gain by their factors


def test_what_has_no_prediction_says_so(make_model, compressed):
    with pytest.raises(ModelError, match="replaced no linear layer"):
        predict_speed(make_model("llama"))
    data = {"calibration": torch.arange(64), "max_length": 16, "num_samples": 4}
    dropped = tnlm.compress(make("Mixtral"), "reap", keep_targets=0.75, progress=False, **data)
    with pytest.raises(ModelError, match="replaced no linear layer"):
        predict_speed(dropped)
    with pytest.raises(OptionError, match=r"tokens=\[0\]"):
        predict_speed(compressed("llama", "svd"), [0])
