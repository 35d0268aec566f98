"""Bytes for the parsers of config, index and report."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tnlm.checkpoint.configuration import check_config
from tnlm.checkpoint.describing import describe
from tnlm.checkpoint.folder import read_index
from tnlm.checkpoint.json_file import read_object
from tnlm.checkpoint.sums import REPORT_FILE, verify
from tnlm.errors import TnlmError

CONFIG = b'{"quantization_config": {"quant_method": "tnlm", "scheme": null, "options": {}, '
CONFIG += b'"format_version": 2, "modules": {}}}'


def parse(data: bytes, folder: Path) -> None:
    """Read bytes as every JSON file of a checkpoint; only errors of tnlm may come of it."""
    config, report, index = (folder / n for n in ("config.json", REPORT_FILE, "index.json"))
    index.write_bytes(data)
    with contextlib.suppress(TnlmError):
        read_index(index)
    for written in ((data, b"{}"), (CONFIG, data)):
        config.write_bytes(written[0])
        report.write_bytes(written[1])
        for read in (describe, verify, lambda f: check_config(read_object(f / config.name), False)):
            with contextlib.suppress(TnlmError):
                read(folder)
