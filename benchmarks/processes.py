"""How much faster several processes compress a model than one, each with one thread.

    python benchmarks/processes.py MODEL TEXT --scheme svd-llm --processes 2

`tnlm.compress` runs in one process and in several, in turn. The time is the processor time of the
busiest process, which other work on the machine changes little, and by stage the wall time from the
reports. The weights of all results must be equal, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.utils.hashing import model_hash

Times = dict[str, Any]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("model", type=Path)
    words.add_argument("text", type=Path)
    words.add_argument("--scheme", default="svd-llm")
    words.add_argument("--processes", type=int, default=2)
    words.add_argument("--rounds", type=int, default=1)
    words.add_argument("--windows", type=int, default=16)
    words.add_argument("--length", type=int, default=512)
    words.add_argument("--out", type=Path, help="folder for processes.json and .md")
    asked = words.parse_args()
    found: dict[int, list[Times]] = {1: [], asked.processes: []}
    for _ in range(asked.rounds):
        for count in found:
            found[count].append(busiest(asked, count))
    if len({times["weights"] for runs in found.values() for times in runs}) > 1:
        raise SystemExit("the results differ")
    text = as_text(found, asked)
    print(text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "processes.json").write_text(json.dumps(found, indent=1))
        (asked.out / "processes.md").write_text(text)


def busiest(asked: argparse.Namespace, count: int) -> Times:
    """Return the times of the process that takes most."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(run, (asked, count, store.port, Path(folder)), nprocs=count)
        times = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return max(times, key=lambda each: each["processor"])


def run(rank: int, asked: argparse.Namespace, count: int, port: int, folder: Path) -> None:
    """Compress the model in one of the processes, and write its times."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    model, tokenizer = load_model(str(asked.model))
    start = time.process_time()
    tnlm.compress(
        model,
        asked.scheme,
        keep_targets=0.8,
        calibration=asked.text,
        tokenizer=tokenizer,
        num_samples=asked.windows,
        max_length=asked.length,
        workers="ranks",
        progress=False,
    )
    times: Times = {**tnlm.report(model).seconds, "processor": time.process_time() - start}
    times["weights"] = model_hash(model)
    (folder / str(rank)).write_text(json.dumps(times))


def as_text(found: dict[int, list[Times]], asked: argparse.Namespace) -> str:
    """Return the medians as a table."""
    alone, shared = (medians(runs) for runs in found.values())
    lines = [
        f"`{asked.scheme}`, {asked.windows} windows of {asked.length} tokens, one thread each:",
        "",
        f"| time | 1 process | {asked.processes} processes | faster |",
        "|---|---|---|---|",
    ]
    for name, seconds in alone.items():
        ratio = seconds / shared[name] if shared[name] else 1.0
        lines.append(f"| {name} | {seconds:.1f} s | {shared[name]:.1f} s | {ratio:.2f} × |")
    return "\n".join(lines) + "\n"


def medians(runs: list[Times]) -> dict[str, float]:
    """Return the median of every time."""
    names = [name for name in runs[0] if name != "weights"]
    return {name: statistics.median(run[name] for run in runs) for name in names}


if __name__ == "__main__":
    main()
