"""A small mixture of experts that is really trained: how good it is, and how it routes; resumable.

    python benchmarks/mixture.py --out docs/benchmarks

The model is that of `mixture_model.py`, which is trained on the text that Python ships when it is
first needed, and kept in the user's cache. What is measured is measured on pieces of documents that
it was not trained on.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from mixture_model import trained_mixture
from python_models import STEPS, WINDOW
from timing import table, write
from torch import Tensor

import tnlm

OFTEN = 50
"""Occurrences of a token from which its experts are looked at."""

Row = dict[str, Any]


def main() -> None:
    """Train if need be, measure, and write the tables."""
    asked = _arguments()
    model, tokenizer, folder = trained_mixture(asked.steps)
    text = folder / "held_out.jsonl"
    found = tnlm.perplexity(model, text, tokenizer, window=WINDOW, windows=asked.windows)
    routed = routing(model, held_out_windows(text, tokenizer, asked.windows))
    losses = json.loads((folder / "training_loss.json").read_text())
    figures = {
        "parameters": model.num_parameters(),
        "expert_parameters": sum(
            p.numel() for n, p in model.named_parameters() if ".experts." in n
        ),
        "steps": len(losses),
        "training_loss": sum(losses[-50:]) / len(losses[-50:]),
        "tokens": found.tokens,
        "perplexity": found.perplexity,
        "routing": routed,
    }
    write(asked.out, "mixture", figures, as_text(figures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=128, help="of 256 tokens, to measure on")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    return parser.parse_args()


def held_out_windows(path: Path, tokenizer: Any, count: int) -> Tensor:
    """Return the first windows of a text as ``(windows, tokens)``."""
    pieces = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    ids = tokenizer("\n\n".join(pieces), return_tensors="pt")["input_ids"][0]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:count]


@torch.no_grad()
def routing(model: Any, windows: Tensor) -> list[Row]:
    """Return for every block how evenly its experts are used, and whether tokens have their own.

    ``effective`` is the exponential of the entropy of the experts' shares, E if all are equal.
    ``usual`` is how often a token goes first to the expert to which that token most often does, a
    mean over tokens that are frequent; ``largest_first`` is what a blind guess would give.
    """
    chosen: dict[int, list[Tensor]] = defaultdict(list)
    for part in windows.split(8):
        for block, logits in enumerate(model(part, output_router_logits=True).router_logits):
            chosen[block].append(logits.topk(model.config.num_experts_per_tok).indices)
    rows = []
    for block, parts in chosen.items():
        experts = torch.cat(parts)
        shares = _shares(experts.flatten(), model.config.num_local_experts)
        first = _shares(experts[:, 0], model.config.num_local_experts)
        rows.append(
            {
                "block": block,
                "least": float(shares.min()),
                "largest": float(shares.max()),
                "effective": float(torch.special.entr(shares).sum().exp()),
                "usual": _usual(windows.flatten().tolist(), experts[:, 0].tolist()),
                "largest_first": float(first.max()),
            }
        )
    return rows


def _shares(experts: Tensor, count: int) -> Tensor:
    return torch.bincount(experts, minlength=count) / len(experts)


def _usual(tokens: list[int], experts: list[int]) -> float:
    """Return how often frequent tokens go to their usual expert.

    Example:
        >>> _usual([5] * 60 + [7], [0] * 45 + [1] * 16)
        0.75
    """
    seen: dict[int, Counter[int]] = defaultdict(Counter)
    for token, expert in zip(tokens, experts, strict=True):
        seen[token][expert] += 1
    often = [counts for counts in seen.values() if counts.total() >= OFTEN]
    usual = sum(counts.most_common(1)[0][1] for counts in often)
    return usual / max(1, sum(counts.total() for counts in often))


def as_text(figures: Row) -> str:
    """Return the figures in words, and the table of the blocks."""
    said = (
        f"{figures['parameters']:,} parameters, {figures['expert_parameters']:,} of them in "
        f"experts; {figures['steps']} steps. Training loss over the last 50 steps "
        f"{figures['training_loss']:.3f}; held-out perplexity {figures['perplexity']:.2f} over "
        f"{figures['tokens']:,} tokens.\n\n"
    )
    head = ["block", "least used expert", "most used", "effective experts"]
    head += ["usual expert", "blind guess"]
    lines = [
        [
            row["block"],
            *(f"{row[key]:.3f}" for key in ("least", "largest")),
            f"{row['effective']:.2f}",
            *(f"{row[key]:.2f}" for key in ("usual", "largest_first")),
        ]
        for row in figures["routing"]
    ]
    return said + table(head, lines)


if __name__ == "__main__":
    main()
