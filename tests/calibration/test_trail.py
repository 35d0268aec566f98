from __future__ import annotations

import torch

from tnlm.calibration.states import States
from tnlm.calibration.trail import Trail


def test_states_are_kept_by_name_until_they_are_dropped(tiny_llama, tmp_path):
    model, trail = tiny_llama(), Trail(tmp_path / "walk").within("layers.0")
    first = States(model, [torch.ones(2, dtype=torch.bfloat16), torch.zeros(3)], on_disk=True)
    assert trail.latest(["a", "b"]) is None
    assert trail.keep("a", first)
    assert trail.latest(["a", "b"]) == "a"
    for state, expected in zip(trail.states(model, "a"), first, strict=True):
        assert torch.equal(state, expected)
        assert state.dtype == expected.dtype
    trail.drop("a")
    trail.drop("a")
    assert trail.latest(["a"]) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["walk", "layers.0"]
    Trail(tmp_path / "walk").clear()
    assert not list(tmp_path.iterdir())


def test_a_trail_that_keeps_nothing(tiny_llama):
    trail = Trail(None).within("layers.0")
    assert not trail.keep("a", States(tiny_llama(), [torch.ones(2)]))
    assert trail.latest(["a"]) is None
    trail.drop("a")
    trail.clear()
