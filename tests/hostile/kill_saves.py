"""Kills saves at random lines and times, and prints what the next call finds; run by its test.

python tests/hostile/kill_saves.py FOLDER COUNT SEED
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
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import tnlm

LAST = 250
"""Lines of a save that begin with the exchange, about."""
PACKAGE = str(Path(tnlm.__file__).parent)


def made(scheme):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    return tnlm.compress(LlamaForCausalLM(config), scheme, progress=False)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines_until(last):
    """Kill this process at the line of the package that has this number; return how many ran."""
    count = 0

    def line(_, event, __):
        nonlocal count
        if event == "line":
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    sys.settrace(lambda f, *_: line if f.f_code.co_filename.startswith(PACKAGE) else None)
    return lambda: count


def killed(save, line, delay):
    """Save in a child process, which is killed at a line or after a time."""
    child = os.fork()
    if child == 0:
        if line:
            lines_until(line)
        save()
        os._exit(0)
    if delay:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(place, count, seed):
    # The usual lock is shared with the children, and stays locked if one is killed with it.
    tqdm.set_lock(threading.RLock())
    generator, folder = random.Random(seed), place / "model"
    models = {scheme: made(scheme) for scheme in ("svd", "kron")}
    known = {}
    for name, model in models.items():
        start = time.perf_counter()
        known[name] = files(tnlm.save(model, folder, overwrite=True))
        most = time.perf_counter() - start
    counted = lines_until(0)
    tnlm.save(models["kron"], folder, overwrite=True)
    sys.settrace(None)
    found = {"killed": 0, "svd": 0, "kron": 0, "wrong": []}
    for number in range(count):
        tnlm.save(models["kron"], folder, overwrite=True)
        first = (0, 1, counted() - LAST)[number % 3]  # by time, at any line, in the exchange
        line = generator.randint(first, counted()) if first else 0
        delay = 0 if line else generator.uniform(0, most)
        save = lambda: tnlm.save(models["svd"], folder, overwrite=True)  # noqa: E731
        found["killed"] += killed(save, line, delay)
        tnlm.load(folder)
        which = [name for name in known if files(folder) == known[name]]
        strays = [p.name for p in (*place.iterdir(), *folder.iterdir()) if ".tnlm" in p.name]
        if not which or strays or len(list(place.iterdir())) > 1:
            found["wrong"].append((line, delay, strays, sorted(files(folder))))
        else:
            found[which[0]] += 1
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
