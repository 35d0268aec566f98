"""Prices of this machine, and of others from a file."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from tnlm.errors import OptionError
from tnlm.layers import prices as module
from tnlm.layers.machine import Machine, key_of
from tnlm.layers.prices import Prices, own_prices, read_prices

TIMES = Machine(1e-6, 1e-6, (1e-10,) * 5, 2e-10, (8e-9, 2e-9, 5e-10, 1e-10), True)
OWN = key_of(torch.float32, "cpu", torch.get_num_threads())
OTHER = f"far CPU torch 9 cpu {torch.get_num_threads()} threads torch.float32"


@pytest.fixture
def file(tmp_path):
    def make(*names, **changes):
        path = tmp_path / "machine.json"
        values = Prices("", TIMES).to_dict()[""] | changes
        path.write_text(json.dumps(dict.fromkeys(names, values)))
        return path

    return make


def refused(path, dtype=torch.float32):
    with pytest.raises(OptionError) as caught:
        read_prices(path, dtype)
    return str(caught.value)


def test_prices_are_those_of_this_machine(monkeypatch):
    monkeypatch.setattr(module, "machine", lambda dtype, device: TIMES)
    own = own_prices(torch.float32)
    assert (own.name, own.times, own.own) == (OWN, TIMES, True)
    assert Prices.of(own.to_dict()) == own
    threads = torch.get_num_threads()
    other = own.name.replace(f"{threads} threads", f"{threads + 1} threads")
    assert not Prices(other, TIMES).own


def test_another_machine_is_named(file, caplog):
    with caplog.at_level(logging.WARNING, "tnlm"):
        assert read_prices(file(OTHER), torch.float32) == Prices(OTHER, TIMES)
    assert f"predicted for {OTHER}, which is not this machine" in caplog.text
    assert read_prices(file(OTHER, OWN), torch.float32).own


def test_prices_for_another_dtype_or_of_several_machines_are_refused(file):
    text = refused(file(OTHER), torch.bfloat16)
    assert OTHER in text
    assert "cpu 1 threads torch.bfloat16" in text.replace(f"{torch.get_num_threads()} t", "1 t")
    assert "needed: those of one machine" in refused(file(OTHER, OTHER.replace("far", "near")))


def test_broken_files_are_refused(file, tmp_path):
    assert "cannot be read" in refused(tmp_path / "none.json")
    assert f"broken entry for {OTHER}" in refused(file(OTHER, macs=[1.0]))
    (tmp_path / "list.json").write_text("[]")
    assert "is not a file of prices" in refused(tmp_path / "list.json")
    mine = "my laptop cpu 1 threads torch.float32"
    assert not Prices.of(Prices(mine, TIMES).to_dict()).own


@pytest.mark.parametrize("name", ["my laptop", "far CPU cpu 1 threads torch.nothing", ""])
def test_a_broken_name_is_refused(name):
    with pytest.raises(ValueError, match="does not end with the device, threads and dtype"):
        Prices.of(Prices(name, TIMES).to_dict())


def test_prices_of_a_device_that_is_not_here_are_of_another_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not Prices(OTHER.replace(" cpu ", " cuda "), TIMES).own
