"""Tries every broken checkpoint: ``python -m tests.hostile [load|auto] [part of an id]``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.hostile.bases import make
from tests.hostile.cases import cases
from tests.hostile.running import faults, run, table


def main() -> int:
    way = sys.argv[1] if len(sys.argv) > 1 else "load"
    word = sys.argv[2] if len(sys.argv) > 2 else ""
    chosen = [case for case in cases() if word in case.id]
    with tempfile.TemporaryDirectory() as root:
        make(Path(root), sorted({case.base for case in chosen}))
        found = run(chosen, Path(root), way=way)
    sys.stdout.write("\n".join([*faults(found), table(found)]) + "\n")
    return bool(faults(found)) if way == "load" else 0


if __name__ == "__main__":
    sys.exit(main())
