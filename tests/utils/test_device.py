"""The device that a caller means."""

from __future__ import annotations

import pytest
import torch

from tests.second_device import second_device
from tnlm.errors import OptionError
from tnlm.utils.device import device_of


def test_a_device_is_named_or_given():
    assert device_of("cpu") == device_of(torch.device("cpu")) == device_of(None)
    with second_device() as device:
        assert device_of("lazy:0") == device


def test_processes_take_one_device_each(monkeypatch):
    class Module:
        @staticmethod
        def device_count():
            return 2

    monkeypatch.setattr(torch, "get_device_module", lambda _: Module)
    with second_device():
        for rank, index in (("0", 0), ("1", 1), ("2", 0)):
            monkeypatch.setenv("LOCAL_RANK", rank)
            assert device_of("lazy") == torch.device("lazy", index)
            assert device_of("lazy:1") == torch.device("lazy", 1)
            assert device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize("given", ["nowhere", "meta", "lazy", "cuda:99", 0.5, "mps:x"])
def test_one_that_cannot_be_used_is_refused(given):
    with pytest.raises(OptionError, match=r"cannot be used: .{3,200}; allowed here: cpu"):
        device_of(given)
