"""Lets atheris choose the bytes: ``python -m tests.hostile.fuzz -max_total_time=60``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["tnlm.checkpoint"]):
        from tests.hostile.parsing import CONFIG, parse
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as seeds:
        (Path(seeds) / "config").write_bytes(CONFIG)
        atheris.Setup([*sys.argv, seeds], lambda data: parse(data, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
