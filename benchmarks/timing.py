"""What the speed benchmarks share: contenders that take turns, Markdown tables, result files."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

TURN = 0.01
"""Seconds that a contender runs for at a time, if a single call is not longer."""
SPENT, FEWEST = 0.5, 3
"""Seconds after which no more turns are taken, once there were so many."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Calls = Sequence[Callable[[], object]]
Times = dict[str, list[float]]


def take_turns(contenders: Mapping[str, Calls], repeats: int) -> Times:
    """Return seconds a call for every contender, one number for each of its turns.

    Contenders take turns, so that a machine that slows down or warms up treats them alike. The
    calls of one contender do the same on weights of their own, and are gone through in a circle:
    with enough of them the weights come from memory, as in a model, and not from a cache.

    Args:
        contenders: name to calls, at least one each.
        repeats: turns of each, at most; ``FEWEST`` if that takes longer than ``SPENT``.

    Example:
        >>> times = take_turns({"sum": [lambda: sum(range(9))], "max": [lambda: max(1, 2)]}, 3)
        >>> len(times["sum"]), speed(times, "sum", "sum")
        (3, 1.0)
    """
    rings = {name: itertools.cycle(calls) for name, calls in contenders.items()}
    warm = {name: _seconds_once_warm(calls) for name, calls in contenders.items()}
    counts = {name: max(1, min(len(contenders[name]), int(TURN / warm[name]))) for name in warm}
    once = sum(counts[name] * warm[name] for name in warm)
    times: Times = {name: [] for name in contenders}
    for _ in range(min(repeats, max(FEWEST, int(SPENT / once)))):
        for name, ring in rings.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                next(ring)()
            times[name].append((time.perf_counter() - start) / counts[name])
    return times


def _seconds_once_warm(calls: Calls) -> float:
    calls[0]()
    start = time.perf_counter()
    calls[-1]()
    return time.perf_counter() - start


def speed(times: Times, name: str, base: str) -> float:
    """Return how many times as fast as ``base`` a contender is: the median over their turns.

    Example:
        >>> speed({"dense": [3.0, 4.0, 9.0], "ours": [1.0, 2.0, 3.0]}, "ours", "dense")
        3.0
    """
    pairs = zip(times[base], times[name], strict=True)
    return statistics.median(before / after for before, after in pairs)


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all weights and buffers that are held, shared ones counted once."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    storages = [t.untyped_storage() for t in tensors if not t.is_meta]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def add_options(
    parser: argparse.ArgumentParser, *, keep_targets: Sequence[float], repeats: int
) -> None:
    """Add the options that both benchmarks have, with these defaults."""
    parser.add_argument("--keep-targets", type=float, nargs="+", default=list(keep_targets))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each, at most")
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    parser.add_argument("--quick", action="store_true", help="fewer cases, in under a minute")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table.

    Example:
        >>> print(table(["a", "b"], [[1, 2.5]]))
        | a | b |
        |---|---|
        | 1 | 2.5 |
    """
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines)


def write(out: Path | None, name: str, results: Mapping[str, Any], text: str) -> None:
    """Print a Markdown text; keep it and the figures in a folder, if there is one."""
    here = machine()
    said = ", ".join(f"{key} {value}" for key, value in here.items())
    text = f"{text}\n\nMachine: {said}.\n"
    print(text)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps({"machine": here, **results}, indent=1) + "\n")


def with_earlier(
    out: Path | None, name: str, key: str, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return rows with their machine, after those in the file that were measured elsewhere.

    A row of the file stays unless this machine measured the same case again.

    Args:
        out: the folder of the file, if there is one.
        name: name of the file.
        key: where the file has its rows.
        rows: new rows, in which numbers are results and text is the case.
    """
    mine = machine_name(machine())
    new = [{"machine": mine, **row} for row in rows]
    path = None if out is None else out / f"{name}.json"
    if path is None or not path.exists():
        return new
    known = json.loads(path.read_text())
    old = [{"machine": machine_name(known["machine"]), **row} for row in known[key]]
    cases = [_case(row) for row in new]
    return [row for row in old if _case(row) not in cases] + new


def _case(row: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name, value in row.items() if isinstance(value, str)}


def machine_name(known: Mapping[str, Any]) -> str:
    """Return a machine's processor, threads and torch in a few words."""
    threads = known["threads"]
    return f"{known['processor']}, {threads} thread{'s' * (threads > 1)}, torch {known['torch']}"


def machine() -> dict[str, str | int]:
    """Return what a speed depends on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
