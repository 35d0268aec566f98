"""Kills runs from files to files at random times, and prints what the next runs make of it.

python tests/hostile/kill_streams.py FOLDER SCHEME COUNT SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import tnlm

DATA = {"calibration": torch.arange(512) % 61 + 3, "max_length": 32}


def made(folder):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = LlamaConfig(**sizes, num_hidden_layers=6, num_attention_heads=4)
    LlamaForCausalLM(config).save_pretrained(folder)


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(first, second):
    return first.keys() == second.keys() and all(map(torch.equal, first.values(), second.values()))


def killed(run, delay):
    """Run in a child process, which is killed after a time; return whether it still ran."""
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(place, scheme, count, seed):
    # The usual lock is shared with the children, and stays locked if one is killed with it.
    tqdm.set_lock(threading.RLock())
    generator = random.Random(seed)
    made(place / "model")
    data = {} if scheme == "svd" else DATA
    call = {"scheme": scheme, "keep_targets": 0.6, "progress": False, **data}
    tnlm.compress_files(place / "model", place / "whole", **call)
    start = time.perf_counter()
    tnlm.compress_files(place / "model", place / "whole", overwrite=True, **call)
    most, expected = time.perf_counter() - start, tensors(place / "whole")
    found = {"killed": 0, "same": 0, "wrong": []}
    for number in range(count):
        out = place / f"out{number}"
        run = lambda out=out: tnlm.compress_files(place / "model", out, **call)  # noqa: E731
        kills = 0
        while kills < 3 and killed(run, generator.uniform(0, most)):
            kills += 1
        found["killed"] += kills
        if not out.exists():
            run()
        strays = sorted(path.name for path in place.iterdir() if path.name.startswith("."))
        whole = same(tensors(out), expected)
        found["same"] += whole
        if strays or not whole:
            found["wrong"].append((number, strays, whole))
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
