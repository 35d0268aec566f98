"""How much faster several processes compress a model than one, each with one thread.

    python benchmarks/processes.py MODEL TEXT FOLDER --scheme svd-llm --jobs 2

`tnlm compress` runs with one process and with several, in turn, and the times of its stages are
read from the reports. The weights of all results must be equal, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import tnlm

STAGES = ("calibrate", "plan", "fit")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("model", type=Path)
    words.add_argument("text", type=Path)
    words.add_argument("folder", type=Path)
    words.add_argument("--scheme", default="svd-llm")
    words.add_argument("--jobs", type=int, default=2)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--windows", type=int, default=16)
    words.add_argument("--length", type=int, default=512)
    words.add_argument("--out", type=Path, help="folder for processes.json and .md")
    asked = words.parse_args()
    found: dict[int, list[dict[str, float]]] = {1: [], asked.jobs: []}
    for _ in range(asked.rounds):
        for jobs in found:
            found[jobs].append(compress(asked, jobs))
    check_equal(asked.folder, list(found))
    text = as_text(found, asked)
    print(text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "processes.json").write_text(json.dumps(found, indent=1))
        (asked.out / "processes.md").write_text(text)


def compress(asked: argparse.Namespace, jobs: int) -> dict[str, float]:
    """Return the seconds of every stage."""
    out = asked.folder / str(jobs)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tnlm", "compress", asked.model, out, "--jobs", jobs]
    command += ["--scheme", asked.scheme, "--keep-targets", 0.8, "--calibration", asked.text]
    command += ["--num-samples", asked.windows, "--max-length", asked.length]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, env=env, capture_output=True)
    return {stage: tnlm.report(out).seconds[stage] for stage in STAGES}


def check_equal(folder: Path, jobs: list[int]) -> None:
    """Raise `SystemExit` unless all results have the same weights."""
    first, *others = (load_file(folder / str(each) / "model.safetensors") for each in jobs)
    for other in others:
        if not all(torch.equal(other[name], tensor) for name, tensor in first.items()):
            raise SystemExit("the results differ")


def as_text(found: dict[int, list[dict[str, float]]], asked: argparse.Namespace) -> str:
    """Return the medians as a table."""
    names = [*STAGES, "all"]
    rows = [{**one, "all": sum(one.values())} for runs in found.values() for one in runs]
    parts = [rows[: asked.rounds], rows[asked.rounds :]]
    alone, shared = ({n: statistics.median(r[n] for r in part) for n in names} for part in parts)
    lines = [
        f"`{asked.scheme}`, {asked.windows} windows of {asked.length} tokens, one thread each:",
        "",
        f"| stage | 1 process | {asked.jobs} processes | faster |",
        "|---|---|---|---|",
    ]
    for name in names:
        ratio = alone[name] / shared[name] if shared[name] else 1.0
        lines.append(f"| {name} | {alone[name]:.1f} s | {shared[name]:.1f} s | {ratio:.2f} × |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
