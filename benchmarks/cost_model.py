"""What large models need of memory, disk and time: counted operations over measured rates.

    python benchmarks/cost_model.py --widths 2048 4096 8192 --out docs/benchmarks

Rates of the products and decompositions that a run consists of are measured at each width; a
model's time is the number of its operations over the rate at the width nearest to its own. Memory
and disk are what ``tnlm plan --resources`` says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cost_rates import EIGEN, check, curve_of, fit_of, measure, total
from transformers import LlamaConfig, LlamaForCausalLM

from tnlm.compression.choices import gather_choices
from tnlm.compression.request import request_of
from tnlm.compression.scratch import skeleton
from tnlm.streaming.blocks import block_names
from tnlm.streaming.resources import Resources, needed

WINDOWS, FEW, TOKENS = 64, 16, 2048
"""Windows for moments and for gradients, and the tokens of each."""


class Matrix(NamedTuple):
    """A matrix of a block.

    Attributes:
        rows: number of outputs.
        columns: number of inputs.
        leads: whether its input is not that of a matrix before.
        share: fraction of tokens that reach it.
    """

    rows: int
    columns: int
    leads: bool
    share: float = 1.0


@dataclass(frozen=True)
class Model:
    """The shape of a model.

    Attributes:
        hidden: width of the residual stream.
        inner: width of a feed-forward layer, or of one expert.
        blocks: number of blocks.
        heads: query heads, and key and value heads.
        vocabulary: number of tokens.
        experts: in a block, and how many a token is sent to; one of each without a mixture.
    """

    hidden: int
    inner: int
    blocks: int
    heads: tuple[int, int]
    vocabulary: int
    experts: tuple[int, int] = (1, 1)

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices of a block."""
        keys, share = (
            self.hidden * self.heads[1] // self.heads[0],
            self.experts[1] / self.experts[0],
        )
        expert = [
            Matrix(self.inner, self.hidden, True, share),
            Matrix(self.inner, self.hidden, False, share),
            Matrix(self.hidden, self.inner, True, share),
        ]
        return [
            Matrix(self.hidden, self.hidden, True),
            *[Matrix(keys, self.hidden, False)] * 2,
            Matrix(self.hidden, self.hidden, True),
            *expert * self.experts[0],
        ]

    @property
    def params(self) -> int:
        """Number of parameters of matrices and tables."""
        inside = sum(each.rows * each.columns for each in self.matrices)
        return self.blocks * inside + 2 * self.vocabulary * self.hidden


MODELS = {
    "7B": Model(4096, 11008, 32, (32, 32), 32000),
    "70B": Model(8192, 28672, 80, (64, 8), 128256),
    "405B": Model(16384, 53248, 126, (128, 8), 128256),
    "400B mixture": Model(6144, 2560, 54, (48, 8), 151936, (160, 8)),
}


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--widths", type=int, nargs="+", default=[2048, 4096, 8192])
    words.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    words.add_argument("--repeats", type=int, default=1)
    words.add_argument("--out", type=Path, help="folder for cost_model.json and .md")
    asked = words.parse_args()
    rates = {width: measure(width, asked.repeats) for width in asked.widths}
    rows = [row_of(name, MODELS[name], rates) for name in asked.models]
    checks = {width: check(width, rates[width]) for width in asked.widths if width <= EIGEN}
    found = {"threads": torch.get_num_threads(), "rates": rates, "checks": checks, "rows": rows}
    text = as_text(found)
    print(text)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "cost_model.json").write_text(json.dumps(found, indent=1))
        (asked.out / "cost_model.md").write_text(text + "\n")


def gather(model: Model) -> dict[str, float]:
    """Return the operations of the statistics of one block, by kind.

    The forward walk multiplies every window once by every weight, the backward walk three times
    more: forwards, again, and back. Every input and output gradient adds half of a square.
    """
    found = 0.0
    for rows, columns, leads, share in model.matrices:
        squares = WINDOWS * columns**2 * leads + FEW * rows**2
        found += share * TOKENS * (2 * (WINDOWS + 3 * FEW) * rows * columns + squares)
    return {"float32": found}


def plan(model: Model) -> dict[str, float]:
    """Return the operations of the error curves of one block, by kind."""
    found = total(curve_of(each.rows, each.columns) for each in model.matrices)
    order = model.inner**3 + 4 * model.inner**2 * model.hidden  # of a layer's channels
    return found | {"float64": found["float64"] + model.experts[0] * order}


def fit(model: Model) -> dict[str, float]:
    """Return the operations of low-rank fits of all matrices of one block, by kind."""
    return total(fit_of(each.rows, each.columns) for each in model.matrices)


def hours(
    model: Model, work: Mapping[str, float], rates: Mapping[int, Mapping[str, float]]
) -> float:
    """Return the core hours of some operations in every block."""

    def rate(kind: str) -> float:
        known = [width for width in rates if kind in rates[width]]
        return rates[min(known, key=lambda width: abs(width - model.hidden))][kind]

    return model.blocks * sum(count / rate(kind) for kind, count in work.items()) / 3600


def row_of(name: str, model: Model, rates: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    stages = {"gather": gather, "plan": plan, "fit": fit}
    row: dict[str, Any] = {"model": name, "params": model.params}
    row |= {stage: hours(model, work(model), rates) for stage, work in stages.items()}
    halves = sum(2 * each.columns**2 * each.leads + each.rows**2 for each in model.matrices)
    row["statistics"] = model.blocks * halves
    if model.experts == (1, 1):
        for scheme in ("svd", "svd-llm", "auto"):
            said = resources(model, scheme)
            row[scheme] = {"peak": said.peak, "scratch": said.scratch, "read": said.read}
    return row


def resources(model: Model, scheme: str) -> Resources:
    """Return what the library says that a run from files to files needs, in bfloat16."""
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_hidden_layers=model.blocks,
        num_attention_heads=model.heads[0],
        num_key_value_heads=model.heads[1],
    )
    empty = skeleton(config, LlamaForCausalLM, torch.bfloat16)
    data: dict[str, Any] = {"num_samples": WINDOWS, "max_length": TOKENS, "gradient_samples": FEW}
    data["calibration"] = torch.arange(64)
    asked = gather_choices(scheme, {"keep": 0.8, **(data if scheme != "svd" else {})})
    return needed(empty, block_names(empty), request_of(asked), asked, None, None)


def as_text(found: Mapping[str, Any]) -> str:
    kinds = list(dict.fromkeys(kind for rates in found["rates"].values() for kind in rates))
    lines = [
        f"Rates in 10⁹ operations a second of CPU time, {found['threads']} thread(s); eigenvalues "
        "and eigenvectors of n³ operations:",
        "",
        f"| width | {' | '.join(kinds)} |",
        "|---" * (len(kinds) + 1) + "|",
    ]
    for width, rates in found["rates"].items():
        cells = [f"{rates[kind] / 1e9:.1f}" if kind in rates else "" for kind in kinds]
        lines.append(f"| {width} | {' | '.join(cells)} |")
    for width, stages in found["checks"].items():
        said = ", ".join(f"{name} {a:.1f} / {b:.1f} s" for name, (a, b) in stages.items())
        lines += ["", f"One {width} x {width} matrix, counted / measured: {said}."]
    lines += [
        "",
        f"`auto` with {WINDOWS} windows of {TOKENS:,} tokens, {FEW} for gradients; core hours, and "
        "GB of a model in bfloat16:",
        "",
        "| model | weights | gather h | plan h | fit h | statistics | peak: svd / svd-llm / auto | "
        "scratch: svd / svd-llm / auto |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        said = [row.get(scheme) for scheme in ("svd", "svd-llm", "auto")]
        both = [
            " / ".join(f"{each[what] / 1e9:.0f}" for each in said if each) or "in memory"
            for what in ("peak", "scratch")
        ]
        spent_in = " | ".join(f"{row[stage]:.1f}" for stage in ("gather", "plan", "fit"))
        lines.append(
            f"| {row['model']} | {2 * row['params'] / 1e9:.0f} | {spent_in} | "
            f"{row['statistics'] / 1e9:.0f} | {both[0]} | {both[1]} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
