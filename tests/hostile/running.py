"""Runs cases in worker processes and sorts what came of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case

ALLOWED = ("refused", "equal", "only by sum")
"""What may come of a broken checkpoint; the rest is a fault of the library."""


def run(cases: Sequence[Case], root: Path, *, way: str = "load") -> list[dict[str, Any]]:
    """Return what came of every case.

    Args:
        cases: to be tried.
        root: holds the bases; cases are made there too.
        way: ``"load"`` for tnlm.load, ``"auto"`` for transformers' own classes.
    """
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.worker", str(root), way],
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if len(found) != len(cases):
        raise RuntimeError(f"the worker stopped after {len(found)} cases: {done.stderr[-2000:]}")
    return found


def faults(found: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line for every case of which nothing allowed came."""
    return [
        f"{Case(*one['case']).id}: {one['outcome']}: {one['told']}"
        for one in found
        if one["outcome"] not in ALLOWED
    ]


def table(found: Iterable[dict[str, Any]]) -> str:
    """Return how often what came of which family."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    slowest = 0.0
    for one in found:
        for row in (one["case"][1].partition(".")[0], "all"):
            counts[row][one["outcome"]] += 1
        slowest = max(slowest, one["seconds"])
    rows = [f"{row}: {sum(found.values())} cases, {dict(found)}" for row, found in counts.items()]
    return "\n".join([*rows, f"slowest: {slowest:.1f} s"])
