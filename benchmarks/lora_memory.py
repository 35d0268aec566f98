"""Peak memory of importance from a LoRA, beside a LoRA's fine-tuning and full gradients.

    python benchmarks/lora_memory.py

Every row is a process of its own: a random Llama is made, and the peak of resident memory is read
before and after one batch has gone through. What lies above the model is what counts:

- finetune: one step of Adam on PEFT's LoRA, the batch as a whole;
- importance: `collect_lora` on the same batch, whose sequences it takes one by one;
- gradients: the gradients of the same matrices' weights, on one sequence;
- fisher: their squares, summed over the batch's sequences.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import peft.tuners.lora  # noqa: F401  # or else its import would be counted
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tnlm.calibration.lora import collect_lora
from tnlm.layers.adapters import attached
from tnlm.targets.selection import select

RANK, ALPHA = 8, 16.0
ROWS = ("finetune", "importance", "gradients", "fisher")


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--hidden", type=int, default=1024)
    words.add_argument("--blocks", type=int, default=8)
    words.add_argument("--length", type=int, default=256)
    words.add_argument("--sequences", type=int, default=4)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--out", type=Path, help="folder for lora_memory.json and .md")
    words.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    asked = words.parse_args()
    if asked.row:
        print(json.dumps(measure(asked)))
        return
    found = {row: min((again(row) for _ in range(asked.repeats)), key=above) for row in ROWS}
    text = as_text(found, asked)
    print(text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "lora_memory.json").write_text(json.dumps(found, indent=1))
        (asked.out / "lora_memory.md").write_text(text + "\n")


def again(row: str) -> dict[str, float]:
    """Run one row in a fresh process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def above(figures: dict[str, float]) -> float:
    return figures["peak"] - figures["start"]


def measure(asked: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(2)
    model, batch = make(asked)
    names = [target.module for target in select(model).targets]
    start = peak()
    {"finetune": finetune, "importance": importance, "gradients": gradients, "fisher": fisher}[
        asked.row
    ](model, names, batch)
    weights = sum(model.get_submodule(name).weight.numel() for name in names)
    return {"start": start, "peak": peak(), "weights": 4 * weights / 2**20}


def make(asked: argparse.Namespace) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=asked.hidden,
        intermediate_size=asked.hidden * 11 // 4,
        num_hidden_layers=asked.blocks,
        num_attention_heads=16,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 8192, (asked.sequences, asked.length))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def peak() -> float:
    """Return the most resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def finetune(model: PreTrainedModel, names: list[str], batch: dict[str, Tensor]) -> None:
    with attached(model, dict.fromkeys(names, RANK), ALPHA / RANK) as adapters:
        adam = torch.optim.Adam([p for a in adapters.values() for p in (a.A, a.B)])
        model(**batch).loss.backward()
        adam.step()


def importance(model: PreTrainedModel, names: list[str], batch: dict[str, Tensor]) -> None:
    collect_lora(model, names, [batch], rank=RANK, alpha=ALPHA, progress=False)


def gradients(model: PreTrainedModel, names: list[str], batch: dict[str, Tensor]) -> None:
    freeze(model, names)
    model(**{key: value[:1] for key, value in batch.items()}).loss.backward()


def fisher(model: PreTrainedModel, names: list[str], batch: dict[str, Tensor]) -> None:
    freeze(model, names)
    sums = {name: torch.zeros_like(model.get_submodule(name).weight) for name in names}
    for row in range(len(batch["labels"])):
        model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
        for name in names:
            weight = model.get_submodule(name).weight
            sums[name].addcmul_(weight.grad, weight.grad)
            weight.grad = None


def freeze(model: PreTrainedModel, names: list[str]) -> None:
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).weight.requires_grad_(True)


def as_text(found: dict[str, dict[str, float]], asked: argparse.Namespace) -> str:
    size = {row: above(figures) for row, figures in found.items()}
    lines = [
        f"{asked.blocks} blocks of width {asked.hidden}, {asked.sequences} sequences of "
        f"{asked.length} tokens, float32, rank {RANK}; the matrices take "
        f"{found['importance']['weights']:.0f} MiB",
        "",
        "| what | MiB above the model | importance is, of that |",
        "|---|---|---|",
        *(f"| {row} | {mib:.0f} | {size['importance'] / mib:.2f} |" for row, mib in size.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
