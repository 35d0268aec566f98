"""Decode with a mixture whose experts are factored, beside the dense one, turn by turn in one run.

    python benchmarks/experts.py OUT [--keep 0.6] [--hidden 1024] [--inner 1792] [--experts 8]
        [--active 2] [--tokens 1 16] [--rounds 40]

One module of experts with random weights, as Mixtral has it, at one to a few tokens: milliseconds
of transformers' own ways to run it, and of the stacks of low-rank factors at `keep` of its
parameters. The figures go to OUT/experts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralModel

import tnlm

WAYS = ("eager", "grouped_mm")
"""Keys of transformers for its own loops and grouped products."""


def mixture(args: argparse.Namespace) -> MixtralModel:
    """Return a model of one block."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=args.experts,
        num_experts_per_tok=args.active,
    )
    return MixtralModel(config).eval()


def calls(args: argparse.Namespace) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return every way to run the experts."""
    dense = mixture(args).layers[0].mlp.experts
    small = tnlm.compress(
        mixture(args), "svd", targets=["experts"], keep_targets=args.keep, progress=False
    )

    def run(way: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(*given: Tensor) -> Tensor:
            dense.config._experts_implementation = way
            return dense(*given)

        return call

    factored: nn.Module = small.layers[0].mlp.experts
    return {**{way: run(way) for way in WAYS}, "factored": factored}


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", type=float, default=0.6)
    for name, value in (("hidden", 1024), ("inner", 1792), ("experts", 8), ("active", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args(argv)
    ways, rows = calls(args), []
    for tokens in args.tokens:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, args.hidden, generator=generator)
        index = torch.rand(tokens, args.experts, generator=generator).topk(args.active).indices
        weights = torch.rand(tokens, args.active, generator=generator)
        found: dict[str, list[float]] = {name: [] for name in ways}
        with torch.no_grad():
            for _ in range(args.rounds):
                for name, call in ways.items():
                    start = time.perf_counter()
                    call(x, index, weights)
                    found[name].append(1e3 * (time.perf_counter() - start))
        row = {"tokens": tokens} | {n: round(statistics.median(s), 3) for n, s in found.items()}
        row["ratio"] = round(row["factored"] / min(row[way] for way in WAYS), 3)
        print(json.dumps(row))
        rows.append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "experts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


if __name__ == "__main__":
    main()
