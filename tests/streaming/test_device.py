"""Walks and fits from files to files run on another device than the CPU."""

from __future__ import annotations

import pytest
import torch

import tnlm
from tests.second_device import SECOND, second_device
from tests.streaming.conftest import tensors
from tnlm.checkpoint import disk_weights
from tnlm.errors import OptionError
from tnlm.streaming.pieces import Pieces

DATA = {"calibration": torch.arange(96) % 61 + 3, "max_length": 16}
pytestmark = pytest.mark.filterwarnings("ignore:at..frobenius_norm:UserWarning")


def some_slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def source(tmp_path, tiny_llama):
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def compressed(source, out, scheme, device=None):
    data = {} if scheme == "svd" else DATA
    tnlm.compress_files(
        source, out, scheme, keep_targets=0.6, progress=False, device=device, **data
    )


def errors(folder):
    return {layer.name: layer.error or 0.0 for layer in tnlm.report(folder).plan.layers}


@pytest.mark.parametrize(
    "scheme", ["svd-llm", *some_slow("svd", "auto", "aa-svd", "basis-sharing")]
)
def test_the_result_is_that_of_the_cpu(scheme, source, tmp_path):
    compressed(source, tmp_path / "first", scheme)
    with second_device() as device:
        compressed(source, tmp_path / "second", scheme, device)
    first, second = tmp_path / "first", tmp_path / "second"
    assert errors(second) == pytest.approx(errors(first), rel=1e-2, abs=1e-4)
    shapes = [{name: t.shape for name, t in tensors(each).items()} for each in (first, second)]
    assert shapes[0] == shapes[1]
    tnlm.load(second)


@pytest.mark.parametrize("scheme", ["svd", *some_slow("auto")])
def test_one_block_at_a_time_is_on_the_device(scheme, source, tmp_path, monkeypatch):
    held, most, places = {}, [], set()
    put = disk_weights.DiskWeights._put

    def counting(self, parameter, old, new):
        held.pop(old, None)
        if new is not parameter:
            held[new] = new.nbytes
            places.add(new.device)
        most.append(sum(held.values()))
        put(self, parameter, old, new)

    monkeypatch.setattr(disk_weights.DiskWeights, "_put", counting)
    with second_device() as device:
        compressed(source, tmp_path / "out", scheme, device)
    assert places == {SECOND}
    if scheme == "svd":  # gradients are tried on three blocks at once
        dense = tensors(source)
        block = sum(t.nbytes for name, t in dense.items() if ".layers.0." in name)
        assert max(most) <= max(block, dense["lm_head.weight"].nbytes)


def test_a_run_goes_on_there(source, tmp_path, monkeypatch):
    write, count = Pieces._write, []

    def stop(self, block):
        count.append(block)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(self, block)

    with second_device() as device:
        with monkeypatch.context() as patched:
            patched.setattr(Pieces, "_write", stop)
            with pytest.raises(KeyboardInterrupt):
                compressed(source, tmp_path / "out", "svd-llm", device)
        compressed(source, tmp_path / "out", "svd-llm", device)
        compressed(source, tmp_path / "whole", "svd-llm", device)
    whole, found = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["svd", "svd-llm", "auto"])
def test_a_gpu_gives_a_model_that_loads(scheme, source, tmp_path):
    compressed(source, tmp_path / "out", scheme, "cuda")
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "out").values())
    tnlm.load(tmp_path / "out")


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "meta", 1.5])
def test_a_device_that_is_not_there_is_refused(device, source, tmp_path):
    with pytest.raises(OptionError, match=rf"device='?{device}'? cannot be used: .*allowed here: "):
        compressed(source, tmp_path / "out", "svd", device)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
