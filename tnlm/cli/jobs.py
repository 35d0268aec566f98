"""Runs a command in several processes of this machine that share its work out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch.distributed as dist
import typer
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from tnlm.errors import OptionError, ProcessError
from tnlm.parallel.choose import RANKS
from tnlm.parallel.ranks import are_given

Jobs = Annotated[
    int | None,
    typer.Option(
        help="Share the work out to this many processes on this machine.",
        rich_help_panel="Large models",
    ),
]
GRACE = 10.0
"""Seconds in which the other processes may end when one has failed."""


def check_jobs(jobs: int | None) -> None:
    """Raise `OptionError` unless a number of processes can be started here."""
    if jobs is None:
        return
    if jobs < 1:
        raise OptionError(f"jobs={jobs}; allowed: a whole number >= 1", argument="jobs")
    if are_given() and jobs != int(os.environ.get("WORLD_SIZE", "1")):
        raise OptionError(
            f"jobs={jobs}, but this process is one of {os.environ['WORLD_SIZE']} that share the "
            "work already; leave it out under torchrun",
            argument="jobs",
        )


def needs_start(jobs: int | None) -> bool:
    """Return whether this process has to start others, which do the work."""
    return jobs is not None and jobs > 1 and not are_given()


def workers_here() -> str | None:
    """Return the workers of a command: all processes, if it was started in several."""
    return RANKS if are_given() else None


def is_first() -> bool:
    """Return whether this process is the one that writes and prints the result."""
    return int(os.environ.get("RANK", "0")) == 0


def run_jobs(jobs: int, main: Callable[[], None]) -> None:
    """Run this process's command in several processes, and wait for them.

    Args:
        jobs: number of processes.
        main: runs the command in ``sys.argv``.

    Raises:
        ProcessError: if one of them is killed.
        SystemExit: if one of them fails, which has said why.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not in __all__
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    with _environment(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(store.port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store outlives the process that fails
        WORLD_SIZE=str(jobs),
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(_threads(jobs))),
    ):
        started = start_processes(_job, args=(main, sys.argv), nprocs=jobs, join=False)
    try:
        while not started.join(grace_period=GRACE):
            pass
    except ProcessExitedException as error:
        if error.exit_code > 0:
            sys.exit(error.exit_code)
        raise ProcessError(
            f"process {error.error_index} of {jobs} was ended by {error.signal_name}, as the "
            "system does if memory runs out; run the command again with fewer processes"
        ) from None
    finally:
        for process in started.processes:
            if process.is_alive():
                process.terminate()


def _job(rank: int, main: Callable[[], None], arguments: Sequence[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    sys.argv = list(arguments)
    main()


def _threads(jobs: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // jobs) if hasattr(os, "sched_getaffinity") else 1


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= values
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
