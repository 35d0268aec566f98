"""What large moments of gradients take is said before the work."""

from __future__ import annotations

import logging

import pytest
import torch

import tnlm
from tnlm.calibration import gradients, room
from tnlm.calibration.room import check_room
from tnlm.errors import CalibrationError

DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}


def test_a_large_moment_is_announced(tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(room, "MUCH", 8 * 64**2)
    with caplog.at_level(logging.WARNING, "tnlm"):
        check_room(tiny_llama(), ["model.layers.0.mlp.up_proj"])
        assert not caplog.records
        check_room(tiny_llama(), ["model.layers.0.mlp.up_proj", "lm_head"])
    assert "lm_head has 64 outputs: the second moment of their gradients takes" in caplog.text


def test_what_cannot_fit_is_refused_before_the_work(tiny_llama, monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(room, "MUCH", 1)
    monkeypatch.setattr(room, "memory_of", lambda device: 8 * 48**2)
    monkeypatch.setattr(gradients, "stream", None)  # no pass is made
    with pytest.raises(CalibrationError, match=r"up_proj|gate_proj.* has 48 outputs.* ignore this"):
        tnlm.compress(model, "kfac-svd", keep_targets=0.5, **DATA)
    monkeypatch.undo()
    tnlm.compress(model, "kfac-svd", keep_targets=0.5, **DATA)


def test_metrics_without_such_moments_say_nothing(tiny_llama, monkeypatch, caplog):
    monkeypatch.setattr(room, "MUCH", 1)
    with caplog.at_level(logging.WARNING, "tnlm"):
        tnlm.compress(tiny_llama(), "fwsvd", keep_targets=0.5, **DATA)
    assert "second moment" not in caplog.text
