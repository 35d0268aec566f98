"""Intrinsic dimension of a classification task, for a pretrained encoder; resumable.

    python benchmarks/intrinsic.py MODEL TRAIN.jsonl HELD_OUT.jsonl OUT --text sentence \
        --dims 10 30 100 300 1000 --kinds did said --seeds 3 --freeze word_embeddings

MODEL is a directory with a classifier, or an encoder, which gets a head with the classes of the
rows. Every score is a line of OUT/KIND/intrinsic.jsonl as soon as it is known, so that a run which
is killed, or is repeated with more sizes, trains what is missing; OUT/intrinsic.md is the table of
accuracies on held-out rows.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timing import table, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tnlm
from tnlm.calibration.rows import read_rows
from tnlm.studies.analysis import IntrinsicDimension
from tnlm.studies.analysis.subspace import KINDS

Row = dict[str, Any]
TRAINING = ("dims", "seeds", "steps", "learning_rate", "batch_size", "max_length", "text", "label")
"""What `tnlm.intrinsic_dimension` is given as it was asked for."""


def main() -> None:
    """Measure the kinds, then write the table."""
    asked = _arguments()
    found = {kind: asdict(measure(asked, kind)) for kind in asked.kinds}
    settings = {name: getattr(asked, name) for name in (*TRAINING, "items", "freeze")}
    settings |= {name: str(getattr(asked, name)) for name in ("model", "train", "held_out")}
    write(asked.out, "intrinsic", {**settings, "kinds": found}, as_text(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", default="text", help="column of the sentences")
    parser.add_argument("--label", default="label")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--freeze", nargs="*", default=[], help="parts of names of parameters")
    parser.add_argument("--items", type=int, default=400, help="held-out rows, from the start")
    return parser.parse_args()


def measure(asked: argparse.Namespace, kind: str) -> IntrinsicDimension:
    """Return the intrinsic dimension of one kind."""
    train, held = (read_rows(path) for path in (asked.train, asked.held_out))
    torch.manual_seed(0)  # draws the head
    model = AutoModelForSequenceClassification.from_pretrained(
        asked.model, num_labels=len({row[asked.label] for row in train})
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in asked.freeze))
    return tnlm.intrinsic_dimension(
        model,
        train,
        tokenizer=AutoTokenizer.from_pretrained(asked.model),
        held_out=held[: asked.items],
        kind=kind,
        score="accuracy",
        output_dir=asked.out / kind,
        **{name: getattr(asked, name) for name in TRAINING},
    )


def as_text(found: dict[str, Row]) -> str:
    """Return the table: mean accuracy over the seeds for every d, and d90."""
    dims = sorted({run["d"] for row in found.values() for run in row["runs"]})
    head = ["kind", "before", *map(str, dims), "all", "wanted", "d90", "interval"]
    lines = []
    for kind, row in found.items():
        scores = [
            statistics.mean(run["score"] for run in row["runs"] if run["d"] == d) for d in dims
        ]
        shown = [f"{100 * score:.1f}" for score in (row["start"], *scores, row["full"])]
        low, high = row["interval"]
        over = f"> {dims[-1]}"
        ends = [f"{100 * row['target']:.1f}", row["dimension"] or over, f"{low} to {high or over}"]
        lines.append([kind, *shown, *ends])
    parameters = next(iter(found.values()))["parameters"]
    return (
        f"{table(head, lines)}\n\nAccuracy in per cent by the numbers trained, of {parameters:,} "
        "parameters in all; means over the seeds."
    )


if __name__ == "__main__":
    main()
