"""Tries every broken checkpoint, and says what came of them: ``python -m tests.hostile --help``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.hostile.bases import make
from tests.hostile.cases import cases
from tests.hostile.running import faults, run, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile")
    parser.add_argument("--way", choices=("load", "auto"), default="load", help="what reads them")
    parser.add_argument("--only", default="", help="a part of the ids of the cases to try")
    parser.add_argument("--times", type=int, default=1, help="how often each draw is repeated")
    asked = parser.parse_args()
    chosen = [case for case in cases(asked.times) if asked.only in case.id]
    found = []
    for base in dict.fromkeys(case.base for case in chosen):
        with tempfile.TemporaryDirectory() as root:
            make(Path(root), [base])
            new = run([case for case in chosen if case.base == base], Path(root), way=asked.way)
        found += new
        sys.stdout.write("\n".join([f"{base}: {len(new)} cases", *faults(new), ""]))
        sys.stdout.flush()
    sys.stdout.write(table(found) + "\n")
    return bool(faults(found)) if asked.way == "load" else 0


if __name__ == "__main__":
    sys.exit(main())
