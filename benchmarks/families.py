"""What works with which family of transformers: every family, five schemes, eight checks.

    python benchmarks/families.py [FAMILY ...] [--schemes svd auto] [--out docs/benchmarks]

Models are tiny and random, made by ``family_configs.py``. Each family and scheme runs in a process
of its own, under a time limit, and adds a line to ``--lines``; what is there is not run
again, so that an interrupted run goes on. The table is written from all lines.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from family_checks import SCHEMES, Row, check
from family_configs import families
from family_table import as_text, totals

LIMIT = 300
"""Seconds that a family may take under one scheme."""


def main() -> None:
    """Run what has not been run, then write the table."""
    asked = _arguments()
    lines = asked.lines
    lines.parent.mkdir(parents=True, exist_ok=True)
    done = {} if asked.again else {(row.family, row.scheme): row for row in read(lines)}
    torch.set_num_threads(1)
    for family in asked.families or families():
        for scheme in asked.schemes:
            row = done.get((family, scheme)) or guarded(family, scheme)
            if (family, scheme) not in done:
                with lines.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
                print(family, scheme, "passes" if row.passes else row.checks, flush=True)
            if not row.params:  # there is no such tiny model
                break
    found = totals(list(read(lines)))
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "families.json").write_text(json.dumps(found, indent=1) + "\n")
    (asked.out / "families.md").write_text(as_text(found))


def guarded(family: str, scheme: str) -> Row:
    """Return what :func:`check` says in a process of its own, or why it said nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(family, scheme, sender))
    process.start()
    sender.close()
    found: Any = f"no answer in {LIMIT} seconds"
    try:
        if receiver.poll(LIMIT):
            found = receiver.recv()
    except EOFError:
        process.join()
        found = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    if isinstance(found, Row):
        return found
    return Row(family, families()[family], scheme, checks={"runs": found})


def _report(family: str, scheme: str, sender: Any) -> None:
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("tnlm").setLevel(logging.ERROR)
    try:
        sender.send(check(family, scheme))
    except Exception as error:  # of the dense model: it cannot be made, or takes no input
        sender.send(f"{type(error).__name__}: {error}"[:500])


def read(lines: Path) -> Iterator[Row]:
    """Yield the last row of every family and scheme."""
    if lines.is_file():
        found = (Row(**json.loads(line)) for line in lines.read_text().splitlines())
        yield from {(row.family, row.scheme): row for row in found}.values()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="model types; all that can be made if none")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--again", action="store_true", help="run what is there once more")
    parser.add_argument("--lines", type=Path, default=Path("runs/families.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
