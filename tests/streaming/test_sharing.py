"""Several processes compress from files to files what one does, and go on after a kill."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

import tnlm
from tests.parallel.conftest import run_in_processes
from tnlm.calibration.store import Statistics
from tnlm.calibration.trail import Trail
from tnlm.errors import CheckpointError, OptionError
from tnlm.parallel.workers import Workers
from tnlm.streaming.pieces import Pieces
from tnlm.streaming.sharing import owners
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.stacks import stack

DATA = {"calibration": torch.arange(96) % 61 + 3, "max_length": 16}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are started as on Linux")


@pytest.fixture
def source(tmp_path, tiny_llama):
    tiny_llama(num_hidden_layers=4).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama):
    """What one process makes with auto, without a kill."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_llama(num_hidden_layers=4).save_pretrained(folder / "model")
    tnlm.compress_files(folder / "model", folder / "out", "auto", keep_targets=0.6, **DATA)
    return folder / "out"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def compressed(source, out, scheme, kill=None):
    last = str(int(os.environ["WORLD_SIZE"]) - 1)
    if kill is not None and os.environ["RANK"] == last:
        _killing(*kill)
    data = {} if scheme == "svd" else DATA
    tnlm.compress_files(
        source, out, scheme, keep_targets=0.6, workers="ranks", progress=False, **data
    )


def _killing(owner, name, count):
    """Let a method kill this process when it is called for the n-th time."""
    method, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("scheme", "count"), [("svd", 2), ("auto", 2), ("basis-sharing", 2), ("svd-llm", 3)]
)
def test_several_processes_write_what_one_does(scheme, count, source, tmp_path, same):
    data = {} if scheme == "svd" else DATA
    whole = tmp_path / "whole"
    tnlm.compress_files(source, whole, scheme, keep_targets=0.6, progress=False, **data)
    ranks = tmp_path / "ranks"
    found = run_in_processes(ranks, count, compressed, source, tmp_path / "out", scheme)
    assert found == [None] * count
    same(whole, tmp_path / "out")
    assert names(tmp_path) == ["model", "out", "ranks", "whole"]


@pytest.mark.parametrize(("owner", "name", "calls"), [(Pieces, "_write", 2), (Trail, "keep", 3)])
def test_a_killed_process_stops_all_and_the_rerun_goes_on(
    owner, name, calls, source, tmp_path, same
):
    tnlm.compress_files(source, tmp_path / "whole", "auto", keep_targets=0.6, **DATA)
    about = source, tmp_path / "out", "auto"
    with pytest.raises(Exception, match="SIGKILL"):
        run_in_processes(tmp_path / "ranks", 2, compressed, *about, (owner, name, calls))
    assert not (tmp_path / "out").exists()
    assert run_in_processes(tmp_path / "ranks", 2, compressed, *about) == [None, None]
    same(tmp_path / "whole", tmp_path / "out")
    assert names(tmp_path) == ["model", "out", "ranks", "whole"]


@pytest.mark.parametrize(
    ("owner", "name", "calls", "count"),
    [
        (Pieces, "_write", 2, 3),
        (Trail, "keep", 3, 1),
        pytest.param(Pieces, "_write", 2, 1, marks=pytest.mark.slow),
        pytest.param(Trail, "keep", 3, 3, marks=pytest.mark.slow),
        pytest.param(Statistics, "mark", 3, 1, marks=pytest.mark.slow),
        pytest.param(Statistics, "mark", 3, 3, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_goes_on(
    owner, name, calls, count, source, tmp_path, same, whole
):
    about = source, tmp_path / "out", "auto"
    with pytest.raises(Exception, match="SIGKILL"):
        run_in_processes(tmp_path / "ranks", 2, compressed, *about, (owner, name, calls))
    assert run_in_processes(tmp_path / "ranks", count, compressed, *about) == [None] * count
    same(whole, tmp_path / "out")
    assert names(tmp_path) == ["model", "out", "ranks"]


@pytest.mark.slow
def test_several_processes_go_on_after_one(source, tmp_path, same, whole):
    about = source, tmp_path / "out", "auto"
    with pytest.raises(Exception, match="SIGKILL"):
        run_in_processes(tmp_path / "ranks", 1, compressed, *about, (Trail, "keep", 5))
    assert run_in_processes(tmp_path / "ranks", 2, compressed, *about) == [None, None]
    same(whole, tmp_path / "out")
    assert names(tmp_path) == ["model", "out", "ranks"]


def test_a_cascade_is_refused(source, tmp_path):
    two = Workers()
    two.size = 2
    with pytest.raises(OptionError, match="cascade='sequential' fits one block after the other"):
        tnlm.compress_files(
            source, tmp_path / "out", "svd-llm", cascade="sequential", workers=two, **DATA
        )


class Apart(Workers):
    """The first of two processes, whose folders are not the same."""

    size = 2

    def gather(self, value):
        return [value, value]


def test_blocks_that_another_process_did_not_write_are_named(source, tmp_path, same):
    call = {"scheme": "svd", "keep_targets": 0.6, "progress": False}
    words = r"has no whole file of model\.layers\.1, model\.layers\.3, which other"
    with pytest.raises(CheckpointError, match=words):
        tnlm.compress_files(source, tmp_path / "out", **call, workers=Apart())
    assert not (tmp_path / "out").exists()
    assert len(names(tmp_path)) == 2  # the parts are kept
    tnlm.compress_files(source, tmp_path / "out", **call)
    tnlm.compress_files(source, tmp_path / "whole", **call)
    same(tmp_path / "whole", tmp_path / "out")


def test_an_executor_fits(source, tmp_path, same):
    from concurrent.futures import ThreadPoolExecutor

    call = {"scheme": "svd-llm", "keep_targets": 0.6, "progress": False, **DATA}
    tnlm.compress_files(source, tmp_path / "whole", **call)
    with ThreadPoolExecutor(1) as executor:
        tnlm.compress_files(source, tmp_path / "out", **call, workers=executor)
    same(tmp_path / "whole", tmp_path / "out")


def test_blocks_that_share_factors_have_one_process():
    blocks = [f"h.{i}" for i in range(4)]
    units = stack([MatrixTarget(f"{b}.up", f"{b}.up", (8, 4)) for b in blocks], 2)
    found = owners(units, blocks, 2)
    assert found == {"h.0": 0, "h.1": 0, "h.2": 1, "h.3": 1, None: 0}


def test_the_result_loads(source, tmp_path):
    run_in_processes(tmp_path / "ranks", 2, compressed, source, tmp_path / "out", "svd")
    assert isinstance(tnlm.load(tmp_path / "out"), LlamaForCausalLM)
