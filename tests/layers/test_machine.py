"""Measured once, stored, and read again; whatever the file holds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from tnlm.layers import machine as module
from tnlm.layers.machine import HOME, LINES, WIDTHS, Machine, machine, probe

CHEAP = Machine(1e-6, 1e-6, (1e-10,) * 5, 2e-10, (8e-9, 2e-9, 5e-10, 1e-10), True)


@pytest.fixture(autouse=True)
def probes(monkeypatch, tmp_path):
    """Count the measurements instead of making them, in a folder of this test."""
    made = []
    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.setattr(module, "probe", lambda *asked: made.append(asked) or CHEAP)
    module._known_or_measured.cache_clear()
    yield made
    module._known_or_measured.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_probe_measures_times_that_are_possible(dtype):
    found = probe(dtype)
    assert 0 < found.call < 1
    assert 0 < found.step < 1
    assert len(found.loads) == len(LINES)
    assert all(load > 0 for load in found.loads)
    assert found.move > 0
    assert len(found.macs) == len(WIDTHS)
    assert all(rate > 0 for rate in found.macs)


def test_times_are_measured_once_and_stored(probes):
    assert machine(torch.float32) == machine(torch.float32) == CHEAP
    module._known_or_measured.cache_clear()  # as a new process would
    assert machine(torch.float32) == CHEAP
    assert len(probes) == 1
    machine(torch.bfloat16)
    assert len(probes) == 2


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"a": 1}', "wrong rates", "a word"])
def test_a_broken_file_is_measured_anew(damage, tmp_path, probes):
    machine(torch.float32)
    file = tmp_path / "machine.json"
    stored = json.loads(file.read_text())
    [entry] = stored.values()
    if damage == "wrong rates":
        entry["macs"] = [1.0]
    elif damage == "a word":
        entry["call"] = "fast"
    file.write_text(json.dumps(stored) if damage in ("wrong rates", "a word") else damage)
    module._known_or_measured.cache_clear()
    assert machine(torch.float32) == CHEAP
    assert len(probes) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(HOME, str(tmp_path / "file"))
    assert machine(torch.float32) == CHEAP


def test_products_are_priced_by_bytes_at_one_token_and_by_work_at_many():
    one, two = (CHEAP.product(tokens, 1000, 1000, 1, 4) for tokens in (1, 2))
    assert one >= 1000 * 1000 * 4 * CHEAP.loads[-1]
    assert two >= one
    long = CHEAP.product(4096, 1000, 1000, 1, 4)
    assert long == pytest.approx(4096 * 1000 * 1000 * CHEAP.macs[-1], rel=1e-3)


def test_narrow_products_cost_more_for_each_multiply_add():
    def rate(width):
        return (CHEAP.product(10**6, 10**6, width, 1, 4) - CHEAP.call) / 10**12 / width

    rates = [rate(width) for width in (1, 4, 9, 16, 40, 64, 200, 256, 4096)]
    assert rates == sorted(rates, reverse=True)
    assert [rate(width) for width in WIDTHS] == pytest.approx(CHEAP.macs)


def test_short_rows_are_read_more_slowly():
    loads = (5e-10, 4e-10, 3e-10, 2e-10, 1e-10)
    slow = dataclasses.replace(CHEAP, call=0.0, loads=loads, macs=(0.0,) * 4)

    def load(rows, columns, **how):
        return slow.product(1, rows, columns, 1, 4, **how) / (4 * rows * columns)

    assert [load(64, columns) for columns in (32, *LINES, 9999)] == pytest.approx(
        [5e-10, *slow.loads, 1e-10]
    )
    assert 3e-10 < load(256, 300) < 4e-10
    # A tall weight is read along its columns, if it is arranged so.
    assert load(2048, 128) == pytest.approx(1e-10)
    assert load(2048, 128, arranged=False) == pytest.approx(5e-10)
    by_rows = dataclasses.replace(slow, column_major=False)
    assert by_rows.product(1, 2048, 128, 1, 4) == pytest.approx(2048 * 128 * 4 * 5e-10)
