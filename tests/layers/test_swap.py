from __future__ import annotations

import errno
import os
import re
import tempfile

import pytest
import torch
from torch import nn

from tnlm.errors import CheckpointError
from tnlm.layers.swap import Shelf, Swap
from tnlm.utils.spill import Spill
from tnlm.utils.undo import Snapshot, attempt

IDS = torch.arange(12)[None] + 3


def fail(model, error, *names, meanwhile=lambda: None):
    """Replace modules by others that do nothing, and fail."""
    swap = Swap(model)

    def work():
        for name in names:
            swap.replace(name, nn.Linear(1, 1))
        meanwhile()
        raise error

    attempt(work, swap.undo)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The place of all temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_a_swap_that_succeeds_keeps_the_new_modules(scratch):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    old = model[1].weight.clone()
    Swap(model).replace("0", nn.Identity())
    assert isinstance(model[0], nn.Identity)
    assert torch.equal(model[1].weight, old)
    assert not list(scratch.iterdir())


def test_replaced_weights_wait_in_a_file(scratch):
    model = nn.Sequential(nn.Linear(30, 30))
    weight = model[0].weight
    swap = Swap(model)
    swap.replace("0", nn.Identity())
    assert weight.numel() == 0
    assert os.fstat(swap._spill._file.fileno()).st_size == 4 * 900
    assert not list(scratch.iterdir())  # it has no name, and ends with the process


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_swap_that_fails_restores_ties_and_shared_biases(error, make_model, scratch):
    def attach():
        model.config.quantization_config = "something"
        model.hf_quantizer = "something"

    model = make_model("masked-bert")
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = dict(model.named_parameters(remove_duplicate=False))
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    expected = model(IDS).logits
    names = ["cls.predictions.decoder", "bert.embeddings.word_embeddings"]
    names += ["bert.encoder.layer.0.output.dense"]
    with pytest.raises(error):
        fail(model, error, *names, meanwhile=attach)
    assert model.get_input_embeddings() is table
    assert model.get_output_embeddings() is head
    assert head.weight is table.weight
    assert head.bias is model.cls.predictions.bias
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert parameter is named[name]
        assert torch.equal(parameter, before[name])
    assert torch.equal(model(IDS).logits, expected)
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert not list(scratch.iterdir())


def test_the_same_place_may_be_replaced_twice():
    model = nn.Sequential(nn.Linear(2, 2))
    first, weight = model[0], model[0].weight.clone()
    with pytest.raises(RuntimeError):
        fail(model, RuntimeError, "0", "0")
    assert model[0] is first
    assert torch.equal(first.weight, weight)


def test_a_file_that_cannot_be_written_leaves_the_module(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "no space left on device")

    model = nn.Sequential(nn.Linear(2, 2))
    module, weight = model[0], model[0].weight.clone()
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    place = re.escape(tempfile.gettempdir())
    with pytest.raises(CheckpointError, match=rf"{place} cannot hold .*no space left.*TMPDIR"):
        fail(model, RuntimeError, "0")
    assert model[0] is module
    assert torch.equal(module.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_come_back(dtype):
    model = nn.Sequential(nn.Linear(3, 2).to(dtype))
    weight = model[0].weight.clone()
    with pytest.raises(RuntimeError):
        fail(model, RuntimeError, "0")
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, weight)
    assert model[0].weight.requires_grad


def test_a_shelf_gives_back_what_was_put_there(scratch):
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    module[0].weight.requires_grad_(False)
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    shelf = Shelf()
    shelf.put("model.layers.0.a", module)
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    assert not list(scratch.iterdir())
    taken = shelf.take("model.layers.0.a")
    assert taken is module
    assert taken.state_dict().keys() == tensors.keys()
    assert all(torch.equal(taken.state_dict()[name], tensors[name]) for name in tensors)
    assert not taken.training
    assert [p.requires_grad for p in taken.parameters()] == [False, True, True, True]
    assert not list(scratch.iterdir())


def test_parameters_that_share_memory_still_do_after_an_undo():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(RuntimeError):
        fail(model, RuntimeError, "0")
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()


@pytest.mark.parametrize("where", ["take", "restore"])
def test_an_undo_that_is_interrupted_is_done_again(where, monkeypatch):
    def interrupted(self, *args):
        monkeypatch.undo()
        raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(2, 2))
    module, weight = model[0], model[0].weight.clone()
    swap = Swap(model)

    def work():
        swap.replace("0", nn.Identity())
        raise RuntimeError

    monkeypatch.setattr(Spill if where == "take" else Snapshot, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        attempt(work, swap.undo)
    assert model[0] is module
    assert torch.equal(module.weight, weight)
