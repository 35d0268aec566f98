"""Runs from files to files that are killed at random times: the next one ends with the same bits.

The full run: pytest tests/hostile/test_streams.py -m hostile
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tnlm

SCRIPT = Path(__file__).with_name("kill_streams.py")


@pytest.mark.hostile
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("scheme", ["svd", "svd-llm", "auto"])
def test_after_kills_a_run_ends_with_the_same_bits(scheme, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), scheme, "20", "1"]
    around = {**os.environ, "PYTHONPATH": str(Path(tnlm.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["same"] == 20
    assert found["killed"] >= 20
