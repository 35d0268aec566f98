"""Runs functions in several processes of torch.distributed, with gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def run_in_processes(folder: Path, count: int, function: Callable[..., Any], *args: Any) -> list:
    """Return what a function returns, or the words of the error it raises, in each of the ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(exist_ok=True)
    multiprocessing.set_forkserver_preload(["tests.parallel.test_ranks"])  # imported once for all
    about = (count, store.port, folder, function, args)
    start_processes(_run, about, nprocs=count, start_method="forkserver")
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(count)]


def _run(rank: int, count: int, port: int, folder: Path, function: Any, args: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        found = function(*args)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    (folder / str(rank)).write_bytes(pickle.dumps(found))


@pytest.fixture
def in_processes(tmp_path):
    """Run a function in some number of processes, and return what each found."""
    return lambda count, function, *args: run_in_processes(tmp_path, count, function, *args)
