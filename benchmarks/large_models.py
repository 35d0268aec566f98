"""Peak memory and time per block of compressing a random checkpoint from files to files.

    python benchmarks/large_models.py FOLDER --blocks 160 --scheme svd --memory 2GB

A random Llama-shaped checkpoint is written to FOLDER/model, one file for each block, and compressed
into FOLDER/out by a process of its own, whose peak of resident memory is read at the end. Schemes
that use data get random tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tnlm
from tnlm.checkpoint.raw import write
from tnlm.schemes import get_scheme
from tnlm.streaming.pieces import Pieces


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("folder", type=Path)
    words.add_argument("--hidden", type=int, default=1024)
    words.add_argument("--blocks", type=int, default=8)
    words.add_argument("--vocabulary", type=int, default=32000)
    words.add_argument("--scheme", default="svd")
    words.add_argument("--keep-targets", type=float, default=0.8)
    words.add_argument("--memory", default="2GB")
    words.add_argument("--windows", type=int, default=8)
    words.add_argument("--length", type=int, default=512)
    words.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    words.add_argument("--out", type=Path, help="folder for large_models.json and .md")
    words.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked)))
        return
    size = make(asked)
    command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {"size": size, **json.loads(done.stdout.splitlines()[-1])}
    text = as_text(found, asked)
    print(text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "large_models.json").write_text(json.dumps(found, indent=1))
        (asked.out / "large_models.md").write_text(text + "\n")


def make(asked: argparse.Namespace) -> int:
    """Write the checkpoint, and return its bytes."""
    folder = asked.folder / "model"
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.hidden,
        intermediate_size=11 * asked.hidden // 4,
        num_hidden_layers=asked.blocks,
        num_attention_heads=max(1, asked.hidden // 64),
        num_key_value_heads=max(1, asked.hidden // 256),
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        number = name.split(".")[2] if ".layers." in name else "rest"
        parts.setdefault(number, {})[name] = tensor
    generator = torch.Generator().manual_seed(0)
    files, total = {}, 0
    for number, like in parts.items():
        file = f"model-{number}.safetensors"
        sizes = write(folder / file, like, drawn(like, generator))
        files.update(dict.fromkeys(sizes, file))
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def drawn(like: dict[str, Tensor], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in like.items():
        if tensor.dim() == 1:
            yield name, torch.ones(tensor.shape)
        else:
            yield name, 0.02 * torch.randn(tensor.shape, generator=generator)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Compress, and return the seconds between blocks, those of stages, and the peak."""
    times: list[float] = []
    take = Pieces.take

    def timed(self: Pieces) -> None:
        before = len(self.files)
        take(self)
        times.extend([time.perf_counter()] * (len(self.files) - before))

    Pieces.take = timed  # type: ignore[method-assign]
    data: dict[str, Any] = {}
    if get_scheme(asked.scheme).needs_calibration:
        count, generator = asked.windows * asked.length, torch.Generator().manual_seed(0)
        ids = torch.randint(3, asked.vocabulary, (count,), generator=generator)
        data = {"calibration": ids, "num_samples": asked.windows, "max_length": asked.length}
        data["gradient_samples"] = max(1, asked.windows // 2)
    report = tnlm.compress_files(
        asked.folder / "model",
        asked.folder / "out",
        asked.scheme,
        keep_targets=asked.keep_targets,
        memory=asked.memory,
        progress=False,
        **data,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gaps = sorted(after - before for before, after in pairwise(times))
    return {
        "peak": peak if sys.platform == "darwin" else peak * 1024,
        "seconds": dict(report.seconds),
        "block": [gaps[0], gaps[len(gaps) // 2], gaps[-1]] if gaps else [],
    }


def as_text(found: dict[str, Any], asked: argparse.Namespace) -> str:
    stages = ", ".join(f"{name} {spent:.0f} s" for name, spent in found["seconds"].items())
    gaps = " / ".join(f"{each:.1f}" for each in found["block"])
    return (
        f"| scheme | model | cap | peak | stages | s per block: least / median / most |\n"
        f"|---|---|---|---|---|---|\n"
        f"| {asked.scheme} | {found['size'] / 1e9:.2f} GB | {asked.memory} | "
        f"{found['peak'] / 1e9:.3f} GB | {stages} | {gaps} |"
    )


if __name__ == "__main__":
    main()
