"""What training wins back of a compressed model: perplexity by tokens and minutes; resumable.

    python benchmarks/healing.py MODEL OUT --calibration train.txt --training mixed.jsonl \
        --text wiki=test.txt --text c4=c4.jsonl --keep-targets 0.8 0.6 --how lora distill

MODEL is compressed by `auto` once for each size. ``lora`` is `tnlm.heal`, ``correct`` the same
towards the dense model's predictions; ``distill`` and ``finetune`` train the factors with the dense
model or the data as the teacher. Models are kept in OUT, as `auto-0.8` and `lora-0.8`,
the last of each.
Results are appended to OUT/results.jsonl as they come; OUT/healing.md is the table.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.studies.journal import Journal

Row = dict[str, Any]
SETTINGS = (
    "model",
    "calibration",
    "training",
    "text",
    "batch_size",
    "max_length",
    "windows",
    "bfloat16",
    "num_samples",
    "gradient_samples",
)
RATES = {"lora": 1e-3, "correct": 1e-3, "distill": 2e-4, "finetune": 2e-4}


def main() -> None:
    """Run what is missing, then write the table."""
    asked = _arguments()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("tnlm").setLevel(logging.INFO)  # how far a correction goes
    settings = {name: getattr(asked, name) for name in SETTINGS}
    journal = Journal(asked.out / "results.jsonl", settings)
    jobs = [(1.0, "dense")] + [(k, how) for k in asked.keep_targets for how in ("none", *asked.how)]
    for keep, how in jobs:
        tokens = asked.tokens if how in RATES else 0
        key = f"{keep:g} {how} {tokens}" + (f" {asked.rate:g}" if asked.rate and tokens else "")
        if key not in journal.rows:
            print(f"{how} at {keep:g} ...", file=sys.stderr, flush=True)
            row = {"keep_targets": keep, "how": how, "tokens": tokens}
            row |= {"rate": asked.rate or RATES[how]} if tokens else {}
            journal.add(key, {**row, **measure(asked, keep, how)})
    done = sorted(journal.rows.values(), key=lambda row: -row["keep_targets"])
    (asked.out / "healing.md").write_text(table(done))
    (asked.out / "healing.json").write_text(json.dumps(done, indent=1) + "\n")
    print(table(done))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--training", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--keep-targets", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--how", nargs="+", choices=list(RATES), default=["lora", "distill"])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--gradient-samples", type=int, default=16)
    parser.add_argument("--cache", type=Path, help="statistics of an earlier calibration")
    parser.add_argument("--rate", type=float, help="peak learning rate; each way has its own")
    parser.add_argument("--bfloat16", action="store_true", help="heal in bfloat16 arithmetic")
    return parser.parse_args()


def measure(asked: argparse.Namespace, keep: float, how: str) -> Row:
    """Compress or load, train, and measure."""
    dense, tokenizer = load_model(asked.model)
    if how == "dense":
        return _perplexities(asked, dense, tokenizer)
    kept = asked.out / f"auto-{keep:g}"
    model, start = copy.deepcopy(dense), time.perf_counter()
    if kept.exists():
        model, _ = load_model(kept)
    else:
        given = {"calibration": asked.calibration, "tokenizer": tokenizer, "cache_dir": asked.cache}
        given |= {"num_samples": asked.num_samples, "gradient_samples": asked.gradient_samples}
        tnlm.compress(model, "auto", keep_targets=keep, progress=False, **given)
        tnlm.save(model, kept, tokenizer=tokenizer)
    if how != "none":
        start = time.perf_counter()
        options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "tokens": asked.tokens,
            "learning_rate": asked.rate or RATES[how],
            "batch_size": asked.batch_size,
            "max_length": asked.max_length,
        }
        teacher = {"teacher": dense} if how == "correct" else {}
        if how in ("lora", "correct"):
            with torch.autocast("cpu", torch.bfloat16, enabled=asked.bfloat16):
                tnlm.heal(model, asked.training, **teacher, **options)
        elif how == "distill":
            tnlm.distill(model, dense, asked.training, train="factors", **options)
        else:
            tnlm.finetune(model, asked.training, train="factors", **options)
    spent = {"minutes": (time.perf_counter() - start) / 60}
    if how != "none":
        tnlm.save(model, asked.out / f"{how}-{keep:g}", tokenizer=tokenizer, overwrite=True)
    return {**spent, **_perplexities(asked, model, tokenizer)}


def _perplexities(asked: argparse.Namespace, model: Any, tokenizer: Any) -> Row:
    found = {}
    for text in asked.text:
        label, _, path = text.partition("=")
        measured = tnlm.perplexity(model, Path(path), tokenizer, windows=asked.windows)
        found[label] = measured.perplexity
    return found


def table(rows: list[Row]) -> str:
    """Return a Markdown table; perplexities with the change from no training.

    Learning rates have a column if any row was given one; older rows do not say theirs.
    """
    texts = [k for k in rows[0] if k not in ("keep_targets", "how", "tokens", "minutes")]
    given = any("rate" in row and row["rate"] != RATES[row["how"]] for row in rows)
    rate = ["rate"] if given else []
    head = ["of the targets", "training", *rate, "tokens", "minutes", *texts]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    plain = {row["keep_targets"]: row for row in rows if row["how"] == "none"}
    for row in rows:
        minutes = f"{row['minutes']:.0f}" if "minutes" in row else ""
        cells = [f"{row['keep_targets']:g}", row["how"]]
        cells += [f"{row[name]:g}" if name in row else "" for name in rate]
        cells += [f"{row['tokens']:,}", minutes]
        before = plain.get(row["keep_targets"])
        for text in texts:
            change = row[text] / before[text] - 1 if before and before is not row else None
            cells.append(f"{row[text]:.2f}" + (f" ({change:+.0%})" if change is not None else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
