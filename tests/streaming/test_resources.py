from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tnlm.compression.request import make_request
from tnlm.streaming.blocks import block_names
from tnlm.streaming.resources import EACH, OVERHEAD, resources
from tnlm.targets.selection import select

PEAK = """
import json, re, sys
from pathlib import Path
import tnlm
source, out, scheme, memory = sys.argv[1:]
tnlm.compress_files(source, out, scheme, memory=memory, progress=False)
status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent that forked
print(json.dumps(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024))
"""


def test_a_wider_model_needs_more(tiny_llama):
    needed = []
    for width in (48, 96):
        model = tiny_llama(intermediate_size=width)
        found = select(model, "all-linear").targets
        needed.append(resources(model, block_names(model), found, make_request("svd")))
    narrow, wide = (each.stages["fit"] - OVERHEAD - 2 * EACH for each in needed)
    assert wide == 2 * narrow == 32 * 96 * (8 * 8 + 4)
    assert needed[0].peak == needed[0].now + max(needed[0].stages.values())
    assert needed[1].written > needed[0].written
    assert "peak memory" in needed[0].lines()[0]


def test_only_windows_for_gradients_are_kept_for_every_block(tiny_llama):
    model = tiny_llama()
    found, request = select(model).targets, make_request("svd")
    none, forward, both = (
        resources(model, block_names(model), found, request, windows).scratch
        for windows in ((0, 0), (8, 16), (8, 16, 2))
    )
    width, blocks = model.config.hidden_size, len(block_names(model))
    assert forward - none == 4 * 16 * width * 3 * 8
    assert both - forward == 4 * 16 * width * (blocks + 4) * 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scheme", ["svd", "tt"])
def test_a_process_stays_below_its_cap(scheme, tiny_llama, tmp_path):
    tiny_llama(hidden_size=512, intermediate_size=2048).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", PEAK, tmp_path / "model", tmp_path / "out", scheme, "650MB"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) < 650e6
