"""Loads broken checkpoints, each in a process of its own with limits, and says what came of it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import tnlm
from tests.hostile.bases import BASES, REFERENCE, logits
from tests.hostile.cases import Case
from tnlm.checkpoint.describing import describe

SECONDS = 20
"""Of computing; a machine that is busy with other things may take longer."""
WAIT = 120
"""Seconds in all, for what waits instead of computing."""
MEMORY = 4 * 2**30
"""Bytes of address space beyond what the worker has."""


def judge(case: Case, root: Path, way: str) -> dict[str, Any]:
    """Break a checkpoint, and load it in a child: what came of it, and how long it took."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        path = Path(scratch) / "model"
        case.make(root, path)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _in_child(lambda: outcome(case, root, path, way), writer)
        os.close(writer)
        with os.fdopen(reader) as stream:
            told = stream.read()
        _, status, used = os.wait4(child, 0)
        seconds = used.ru_utime + used.ru_stime
        if os.WIFSIGNALED(status):
            late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
            return {"outcome": "late" if late else "crash", "told": str(status), "seconds": seconds}
        found = json.loads(told) if told else {"outcome": "crash", "told": "no answer"}
        if (path / "exploded").exists():
            found |= {"outcome": "ran code"}
        return {**found, "seconds": seconds}


def _in_child(task: Callable[[], dict[str, Any]], writer: int) -> None:
    """Run a task within limits and write what it returns; never come back."""
    with contextlib.suppress(BaseException):
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        logging.disable(logging.CRITICAL)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        now = int(sum(os.times()[:2]))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(WAIT)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + now, SECONDS + now))
        try:
            found = task()
        except BaseException:
            found = {"outcome": "raw", "told": traceback.format_exc()[-2000:]}
        os.write(writer, json.dumps(found).encode())
    os._exit(0)


def outcome(case: Case, root: Path, path: Path, way: str = "load") -> dict[str, Any]:
    """Load a broken checkpoint here and now: what came of it."""
    if way == "load":
        for read in (describe, tnlm.verify):
            with contextlib.suppress(tnlm.TnlmError):
                read(path)
    try:
        model = tnlm.load(path) if way == "load" else _auto(case).from_pretrained(path)
    except tnlm.TnlmError as error:
        return {"outcome": "refused", "told": str(error)[:300]}
    except Exception as error:
        if way == "load":
            raise
        return {"outcome": "refused", "told": repr(error)[:300]}
    expected = torch.load(root / f"{case.base}-{REFERENCE}")
    same = False
    with contextlib.suppress(Exception):
        same = torch.equal(logits(model), expected)
    if same:
        return {"outcome": "equal", "told": ""}
    try:
        tnlm.load(path, verify=True)
    except tnlm.TnlmError as error:
        return {"outcome": "only by sum" if case.by_sum else "wrong", "told": str(error)[:300]}
    return {"outcome": "wrong", "told": "and verify does not see it"}


def _auto(case: Case) -> Any:
    return AutoModelForMaskedLM if BASES[case.base].kind == "bert" else AutoModelForCausalLM


def main() -> None:
    """Read cases from the input, a JSON list a line, and write what came of each."""
    root, way = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        case = Case(*json.loads(line))
        found = judge(case, root, way)
        sys.stdout.write(json.dumps({"case": case, **found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
