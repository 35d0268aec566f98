"""A run that is killed goes on, loses at most a block, and ends with the same bits."""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest
import torch
from tqdm import tqdm

import tnlm
from tnlm.calibration.store import Statistics
from tnlm.calibration.trail import Trail
from tnlm.compression.fitting import Fitting
from tnlm.errors import CapacityError, CheckpointError, ModelError, OptionError
from tnlm.streaming import pieces
from tnlm.streaming.pieces import Pieces

DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture
def source(tmp_path, tiny_llama):
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def killed(work):
    """Run work in a child process that kills itself; return whether it did."""
    tqdm.set_lock(threading.RLock())  # the usual one is shared with children
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killing(monkeypatch, owner, name, count):
    """Let a method kill the process when it is called for the n-th time."""
    method, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("scheme", ["svd", "auto", "basis-sharing"])
@pytest.mark.parametrize(("owner", "name"), [(Fitting, "_put"), (Pieces, "_write")])
def test_a_killed_run_goes_on(scheme, owner, name, source, tmp_path, same, monkeypatch):
    data = {} if scheme == "svd" else DATA
    call = {"scheme": scheme, "progress": False, "keep_targets": 0.6, **data}
    tnlm.compress_files(source, tmp_path / "whole", **call)
    with monkeypatch.context() as patched:
        killing(patched, owner, name, 11 if name == "_put" else 3)
        assert killed(lambda: tnlm.compress_files(source, tmp_path / "out", **call))
    assert len(names(tmp_path)) == 4  # the model, the whole result, a lock and the pieces
    written = []
    write = Pieces._write
    monkeypatch.setattr(Pieces, "_write", lambda self, b: (written.append(b), write(self, b)))
    tnlm.compress_files(source, tmp_path / "out", **call)
    assert "model.layers.0" not in written
    assert names(tmp_path) == ["model", "out", "whole"]
    same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(("scheme", "mark"), [("svd-llm", 3), ("auto", 3), ("auto", 6)])
@pytest.mark.parametrize(("owner", "name"), [(Statistics, "mark"), (Trail, "drop")])
def test_a_killed_walk_goes_on(scheme, mark, owner, name, source, tmp_path, same, monkeypatch):
    call = {"scheme": scheme, "progress": False, "keep_targets": 0.6, **DATA}
    tnlm.compress_files(source, tmp_path / "whole", **call)
    with monkeypatch.context() as patched:
        killing(patched, owner, name, mark)
        assert killed(lambda: tnlm.compress_files(source, tmp_path / "out", **call))
    marks, before = [], Statistics.mark
    monkeypatch.setattr(Statistics, "mark", lambda self: (marks.append(1), before(self)))
    tnlm.compress_files(source, tmp_path / "out", **call)
    blocks = 4 if scheme == "svd-llm" else 8
    assert blocks - mark <= len(marks) <= blocks - 2  # the finished ones are not walked again
    same(tmp_path / "whole", tmp_path / "out")
    assert names(tmp_path) == ["model", "out", "whole"]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_a_walk_backwards_goes_on_from_any_state(count, source, tmp_path, same, monkeypatch):
    call = {"scheme": "fwsvd", "progress": False, **DATA}
    tnlm.compress_files(source, tmp_path / "whole", **call)
    with monkeypatch.context() as patched:
        killing(patched, Trail, "keep", count)
        assert killed(lambda: tnlm.compress_files(source, tmp_path / "out", **call))
    tnlm.compress_files(source, tmp_path / "out", **call)
    same(tmp_path / "whole", tmp_path / "out")


def test_a_cascade_goes_on(source, tmp_path, same, monkeypatch):
    call = {"scheme": "aa-svd", "refine_passes": 1, "progress": False, **DATA}
    tnlm.compress_files(source, tmp_path / "whole", **call)
    with monkeypatch.context() as patched:
        killing(patched, Pieces, "_write", 3)
        assert killed(lambda: tnlm.compress_files(source, tmp_path / "out", **call))
    tnlm.compress_files(source, tmp_path / "out", **call)
    same(tmp_path / "whole", tmp_path / "out")
    assert names(tmp_path) == ["model", "out", "whole"]


@pytest.fixture
def unfinished(source, tmp_path, monkeypatch):
    """Leave a run of svd with two finished blocks."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        write, count = Pieces._write, []
        patched.setattr(
            Pieces,
            "_write",
            lambda self, block: stop() if count[1:] else (count.append(1), write(self, block)),
        )
        with pytest.raises(KeyboardInterrupt):
            tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
    [pieces] = tmp_path.glob(".out-*.tnlm-parts")
    assert names(tmp_path) == [pieces.name, "model"]
    return pieces


def test_another_recipe_is_refused_with_the_difference(unfinished, source, tmp_path):
    def fails(message, **choices):
        with pytest.raises(CheckpointError, match=message):
            tnlm.compress_files(source, tmp_path / "out", "svd", progress=False, **choices)
        assert unfinished.is_dir()

    fails(r"another recipe: keep_targets was null, is 0\.5", keep_targets=0.5)
    fails(r"ignore was .* is .*q_proj", ignore="q_proj|.*q_proj")
    weights = source / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    fails("files was")


def test_a_refused_call_leaves_the_pieces(unfinished, source, tmp_path):
    for kind, choices in ((CapacityError, {"memory": "1MB"}), (OptionError, {"rank": -1})):
        with pytest.raises(kind):
            tnlm.compress_files(source, tmp_path / "out", "svd", progress=False, **choices)
        assert unfinished.is_dir()


def test_a_damaged_piece_is_made_again(unfinished, source, tmp_path, same):
    piece = unfinished / "part-00001.safetensors"
    piece.write_bytes(piece.read_bytes()[:-8])
    (unfinished / "part-00002.safetensors").write_bytes(b"half")
    tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
    tnlm.compress_files(source, tmp_path / "whole", "svd", progress=False)
    same(tmp_path / "whole", tmp_path / "out")


def test_a_run_goes_on_when_a_full_disk_has_room_again(source, tmp_path, same, monkeypatch):
    call = {"scheme": "svd", "progress": False}
    write, written = pieces.write, []

    def full(path, *args):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        written.append(path)
        return write(path, *args)

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "write", full)
        with pytest.raises(CheckpointError, match="make room, or give another scratch="):
            tnlm.compress_files(source, tmp_path / "out", **call)
    assert not (tmp_path / "out").exists()
    tnlm.compress_files(source, tmp_path / "out", **call)
    tnlm.compress_files(source, tmp_path / "whole", **call)
    same(tmp_path / "whole", tmp_path / "out")
    assert names(tmp_path) == ["model", "out", "whole"]


def test_pieces_of_a_model_that_cannot_be_compressed_are_removed(tmp_path, tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="not finite"):
        tnlm.compress_files(tmp_path / "model", tmp_path / "out", "svd", progress=False)
    assert names(tmp_path) == ["model"]


def test_a_second_run_on_one_output_is_refused(source, tmp_path, monkeypatch):
    seen = []
    write = Pieces._write

    def second(self, block):
        if not seen:
            with pytest.raises(CheckpointError, match="is writing") as caught:
                tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
            seen.append(caught.value)
        write(self, block)

    monkeypatch.setattr(Pieces, "_write", second)
    tnlm.compress_files(source, tmp_path / "out", "svd", progress=False)
    assert len(seen) == 1
    assert names(tmp_path) == ["model", "out"]
