"""Kronecker sums of published shapes in three bases of a Llama's residual stream; resumable.

    python benchmarks/rotated.py MODEL OUT --calibration train.txt --text wiki=test.txt \
        --basis own principal procrustes low-rank --blocks 5 15 25

The shapes are ProcrustesGPT's: three terms, of which one factor is a vector over four parts of the
residual stream, for all linear layers but the values. They are fitted under the two-sided metric in
the model's own basis with folded norms, at the principal directions, and after the alternation;
low rank with as many parameters stands beside them, and does not depend on the basis.
Statistics are gathered once, and rotated; they are kept in OUT/cache, or in ``--cache``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import tnlm
from tnlm.allocation.pricing import model_cost
from tnlm.checkpoint.dense_models import load_model
from tnlm.compression.choices import gather_choices
from tnlm.compression.evidence import Evidence
from tnlm.compression.gatherers.base import Found
from tnlm.compression.job import Job, prepare
from tnlm.compression.pieces import alternate
from tnlm.compression.pipeline import carry_out
from tnlm.compression.procrustes import pieces_of, principal
from tnlm.compression.request import request_of
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling, to_dict
from tnlm.decompositions.kronecker import KroneckerSpec
from tnlm.metrics.sides import turned
from tnlm.plans.plan import LayerPlan, Plan
from tnlm.targets.base import Member
from tnlm.targets.residual import ResidualStream, residual_stream

Row = dict[str, Any]
BASES = ["own", "principal", "procrustes", "low-rank"]
PARTS, TERMS = 4, 3
MATRICES = ("q_proj", "k_proj", "gate_proj", "up_proj", "o_proj", "down_proj")


def main() -> None:
    """Measure the bases that are missing, then print the table."""
    asked = _arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "rotated.jsonl"
    done = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    for basis in asked.basis:
        if all(row["basis"] != basis for row in done):
            done.append(_measure(asked, basis))
            with results.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    print(_table(done))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--basis", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--blocks", nargs="*", type=int, help="blocks to replace; all if not given")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--cache", type=Path)
    return parser.parse_args()


@torch.no_grad()
def _measure(asked: argparse.Namespace, basis: str) -> Row:
    model, tokenizer = load_model(asked.model)
    choices = {"calibration": asked.calibration, "tokenizer": tokenizer, "max_length": asked.window}
    given = gather_choices("kron", choices | {"cache_dir": asked.cache or asked.out / "cache"})
    job = prepare(model, request_of(given), None, None, given.calibration, progress=False)
    chosen = [each for each in job.selection.targets if _is_chosen(asked, each.name)]
    job = replace(job, units=chosen, selection=replace(job.selection, targets=chosen))
    stream = residual_stream(model)
    decided = _planned(model, job, stream, low_rank=basis == "low-rank")
    gains = {name: _gain(model, name) + norm.offset for name, norm in stream.norms.items()}
    turn = torch.eye(stream.width, dtype=torch.float64)
    tnlm.rotate(model, turn, untie=True)
    row: Row = {
        "basis": basis,
        "keep": decided.targets_after.params / decided.targets_before.params,
    }
    there = replace(job, evidence=_folded(job.evidence, stream, gains, turn))
    if basis in ("principal", "procrustes"):
        turn = principal(model, there, stream)
        tnlm.rotate(model, turn)
        there = replace(job, evidence=_folded(job.evidence, stream, gains, turn))
    if basis == "procrustes":
        found, row["errors"] = alternate(
            list(pieces_of(model, there, decided, stream)), asked.rounds
        )
        tnlm.rotate(model, found)
        there = replace(job, evidence=_folded(job.evidence, stream, gains, turn @ found))
    carry_out(model, there, decided, progress=False)
    errors = [layer.error or 0.0 for layer in tnlm.report(model).plan.layers]
    row["error"] = sum(error**2 for error in errors) / len(errors)
    for text in asked.text:
        label, _, path = text.partition("=")
        row[label] = tnlm.perplexity(
            model, Path(path), tokenizer, window=asked.window, windows=asked.windows
        ).perplexity
    return row


def _is_chosen(asked: argparse.Namespace, name: str) -> bool:
    block = int(name.split(".layers.")[1].split(".")[0])
    return name.endswith(MATRICES) and (not asked.blocks or block in asked.blocks)


def _planned(model: PreTrainedModel, job: Job, stream: ResidualStream, *, low_rank: bool) -> Plan:
    """Return a plan that splits the stream's side of every matrix into parts."""
    sums, plain, layers = get_format("kronecker"), get_format("low-rank"), []
    split = (PARTS, stream.width // PARTS)
    for target in job.selection.targets:
        reads = target.module in stream.readers
        out, inp = target.shape
        sides = ((1, out), split) if reads else (split, (1, inp))
        spec = KroneckerSpec(TERMS, *sides)
        structure, network = sums, sums.network(target.shape, spec)
        if low_rank:
            [spec] = plain.candidates(target.shape, {}, Ceiling(network.params))
            structure, network = plain, plain.network(target.shape, spec)
        costs = target.dense_cost(4), target.cost(network, 4)
        what = target.name, "linear", target.shape, structure.name, to_dict(spec)
        layers.append(LayerPlan(*what, *costs))
    return Plan("kron", "two-sided", {}, tuple(layers), model_cost(model))


def _gain(model: PreTrainedModel, name: str) -> Tensor:
    norm: Any = model.get_submodule(name)
    gain: Tensor = norm.weight.detach().double()
    return gain


def _folded(
    evidence: Evidence, stream: ResidualStream, gains: dict[str, Tensor], turn: Tensor
) -> Evidence:
    """Return the evidence after the norms' gains are folded, and the stream is rotated."""

    def read(found: Found, target: Member, name: str) -> Tensor:
        values = found.read(target, name)
        if name == "moment" and target.module in stream.readers:
            return turned(values.double(), turn / gains[stream.readers[target.module]][:, None])
        if name == "gradient" and target.module in stream.writers:
            return turned(values.double(), turn)
        return values

    sources = {
        n: replace(found, read=partial(read, found)) for n, found in evidence.sources.items()
    }
    return replace(evidence, sources=sources, _latest=None)


def _table(rows: list[Row]) -> str:
    texts = [key for key in rows[0] if key not in ("basis", "keep", "errors", "error")]
    lines = ["| basis | kept | mean squared error | " + " | ".join(texts) + " |"]
    lines.append("|" + "---|" * (3 + len(texts)))
    for row in rows:
        cells = [row["basis"], f"{row['keep']:.3f}", f"{row['error']:.4f}"]
        lines.append("| " + " | ".join(cells + [f"{row[text]:.2f}" for text in texts]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
