"""Kills that cannot be caught: the next call finds the old model or the new one, and no strays.

The full run: pytest tests/hostile/test_kills.py -m hostile
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tnlm

SCRIPT = Path(__file__).with_name("kill_saves.py")


def kill_saves(folder, count, seed):
    command = [sys.executable, str(SCRIPT), str(folder), str(count), str(seed)]
    around = {**os.environ, "PYTHONPATH": str(Path(tnlm.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize(
    "count", [pytest.param(3, id="few"), pytest.param(60, id="all", marks=pytest.mark.hostile)]
)
def test_after_a_kill_the_old_model_or_the_new_one_is_found(count, tmp_path):
    found = kill_saves(tmp_path, count, seed=count)
    assert found["wrong"] == []
    assert found["killed"] >= count // 2
    assert found["svd"] + found["kron"] == count
