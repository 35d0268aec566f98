from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import tnlm
from tnlm.errors import CheckpointError
from tnlm.utils.spill import Spill
from tnlm.utils.undo import Snapshot, attempt, leaves_model, signals_held


def test_work_that_succeeds_is_not_undone():
    assert attempt(lambda: 3, lambda: pytest.fail("undone")) == 3


def test_an_undo_that_fails_once_is_run_again():
    done = []

    def undo():
        done.append(len(done))
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        attempt(lambda: 1 / 0, undo)
    assert done == [0, 1]
    assert isinstance(caught.value.__context__, ZeroDivisionError)


@pytest.mark.parametrize("times", [1, 3])
def test_ctrl_c_waits_for_the_undo_to_end(times):
    done = []

    def undo():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        done.append("undone")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: 1 / 0, undo)
    assert done == ["undone", "undone"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_an_interrupted_end_left_is_replaced():
    before = signal.getsignal(signal.SIGINT)
    block = signals_held()
    block.__enter__()  # and never left
    with signals_held():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_touch_no_handler():
    found = []

    def work():
        with signals_held():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_model_is_put_back_with_all_that_hangs_on_it(make_model):
    model = make_model("tied-llama")
    parameter = model.model.norm.weight
    parameter.grad = gradient = torch.ones_like(parameter)
    handle = model.register_forward_hook(lambda *_: None)
    names = [name for name, _ in model.named_modules()]
    told, generation = model.config.to_dict(), model.generation_config.to_dict()
    before = Snapshot(model)
    model.train().requires_grad_(False)
    handle.remove()
    model.model.register_forward_pre_hook(lambda *_: None)
    model.set_submodule("model.layers.0.mlp", nn.Identity())
    model.config.quantization_config = model.added = "something"
    model.config.architectures.append("Another") if model.config.architectures else None
    model.generation_config.max_length = 3
    parameter.grad = None
    before.restore()
    before.restore()
    assert [name for name, _ in model.named_modules()] == names
    assert model.config.to_dict() == told
    assert model.generation_config.to_dict() == generation
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert parameter.grad is gradient
    assert len(model._forward_hooks) == 1
    assert not model.model._forward_pre_hooks
    assert not hasattr(model, "added")


def contents(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


@pytest.mark.parametrize("where", ["report_of", "with_errors"])
def test_a_report_that_cannot_be_made_leaves_the_model(where, make_model, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("no package metadata")

    model = make_model("gpt2")
    before = contents(model)
    monkeypatch.setattr(f"tnlm.compression.pipeline.{where}", missing)
    with pytest.raises(ModuleNotFoundError):
        tnlm.compress(model, "svd", progress=False)
    assert same(model, before)
    assert not hasattr(model, "tnlm_report")


@pytest.mark.parametrize("puts", [0, 5, 20])
def test_a_full_temporary_directory_leaves_the_model(puts, make_model, monkeypatch):
    real, count = Spill.put, iter(range(1000))

    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, _):
            raise OSError(28, os.strerror(28))

        def __getattr__(self, name):
            return getattr(self._file, name)

    def put(self, tensor):
        if next(count) == puts:
            real(self, tensor)
            self._file = Full(self._file)
        return real(self, tensor)

    model = make_model("gpt2")
    before = contents(model)
    monkeypatch.setattr(Spill, "put", put)
    with pytest.raises(CheckpointError, match=r"temporary directory .* cannot hold .*TMPDIR"):
        tnlm.compress(model, "svd", progress=False)
    assert same(model, before)


def test_a_dense_copy_that_fails_halfway_leaves_the_model_compressed(compressed, monkeypatch):
    def broken(self):
        raise MemoryError

    model = compressed("gpt2", "svd")
    before = contents(model)
    monkeypatch.setattr(type(model), "tie_weights", broken)
    with pytest.raises(MemoryError):
        tnlm.to_dense(model)
    assert same(model, before)


def test_gradients_are_taken_again_after_an_interrupted_no_grad():
    @leaves_model
    def work(model):
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work(nn.Linear(2, 2))
    assert torch.is_grad_enabled()


def test_a_context_whose_end_was_interrupted_ends_before_the_undo():
    done = []

    @contextmanager
    def context():
        try:
            yield
        finally:
            done.append("context")

    def work():
        block = context()
        block.__enter__()  # its end does not come
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(work, lambda: done.append("undo"))
    assert done == ["context", "undo", "undo"]
