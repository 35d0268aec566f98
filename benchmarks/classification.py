"""Accuracy of schemes on a classifier, as compressed and after fine-tuning; resumable.

    python benchmarks/classification.py MODEL TRAIN.jsonl DEV.jsonl OUT --text sentence \
        --scheme svd fwsvd lora-svd tfwsvd lpaf magnitude-svd --share 0.33 --seeds 3

MODEL is a directory with a fine-tuned classifier. Every linear matrix of its blocks gets the same
share of its full rank; ``magnitude-svd`` drops the smaller half of every matrix first. A seed draws
the calibration data and what training draws. Results are appended to OUT/results.jsonl as they
come; OUT/classification.md is the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tnlm
from tnlm.studies.journal import Journal

Row = dict[str, Any]
MAGNITUDE = "magnitude-svd"
"""A control for LPAF: half of every matrix's entries go, the smallest, before the SVD."""

FILES = ("model", "train", "dev")
SETTINGS = ("targets", "share", "tokens", "samples", "learning_rate", "text", "label", "max_length")


def main() -> None:
    """Run what is missing, then write the table."""
    asked = _arguments()
    settings = {name: getattr(asked, name) for name in SETTINGS}
    settings |= {name: str(getattr(asked, name)) for name in FILES}
    journal = Journal(asked.out / "results.jsonl", settings)
    jobs = [("dense", 0)] + [(s, seed) for s in asked.scheme for seed in range(asked.seeds)]
    for scheme, seed in jobs:
        if f"{scheme} {seed}" not in journal.rows:
            print(f"{scheme}, seed {seed} ...", file=sys.stderr, flush=True)
            row = {"scheme": scheme, "seed": seed, **measure(asked, scheme, seed)}
            journal.add(f"{scheme} {seed}", row)
    done = [journal.rows[f"{scheme} {seed}"] for scheme, seed in jobs]
    (asked.out / "classification.md").write_text(table(done))
    (asked.out / "classification.json").write_text(json.dumps(done, indent=1) + "\n")
    print(table(done))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("dev", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", nargs="+", required=True)
    parser.add_argument("--targets", default=r".*\.layer\.\d+\..*", help="the blocks of BERT")
    parser.add_argument("--share", type=float, default=0.33, help="of the full rank")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=100_000, help="of fine-tuning")
    parser.add_argument("--samples", type=int, default=512, help="of calibration")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--max-length", type=int, default=64)
    return parser.parse_args()


def measure(asked: argparse.Namespace, scheme: str, seed: int) -> Row:
    """Compress, measure, fine-tune, measure again."""
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = AutoModelForSequenceClassification.from_pretrained(asked.model).eval()
    columns = {"text": asked.text, "label": asked.label, "max_length": asked.max_length}
    train, dev = (tnlm.labelled(path, tokenizer, **columns) for path in (asked.train, asked.dev))
    pad = tokenizer.pad_token_id
    if scheme == "dense":
        return {"accuracy": accuracy(model, dev, pad), "parameters": model.num_parameters()}
    start = time.perf_counter()
    options: dict[str, Any] = {"targets": asked.targets}
    layers = tnlm.plan(model, "svd", **options, progress=False).layers
    options["rank"] = round(asked.share * min(min(layer.shape) for layer in layers))
    row: Row = {}
    if scheme == MAGNITUDE:
        for layer in layers:
            drop_smallest(model.get_submodule(layer.name).weight)
        row["pruned"] = accuracy(model, dev, pad)
        scheme = "svd"
    if scheme != "svd":
        options |= {
            "calibration": _drawn(train, asked.samples, seed),
            "num_samples": asked.samples,
            "gradient_samples": asked.samples,
            "tokenizer": tokenizer,
            "seed": seed,
        }
    if scheme == "lpaf":  # it is trained before it is factorized
        options |= {"training": train, "recover": "none", "recover_tokens": asked.tokens}
    tnlm.compress(model, scheme, progress=False, **options)
    plan = tnlm.report(model).plan
    row |= {
        "rank": options["rank"],
        "keep_targets": plan.targets_after.params / plan.targets_before.params,
        "parameters": model.num_parameters(),
        "accuracy": accuracy(model, dev, pad),
        "seconds": time.perf_counter() - start,
    }
    start = time.perf_counter()
    tnlm.finetune(
        model,
        train,
        tokenizer=tokenizer,
        label="labels",
        tokens=asked.tokens,
        learning_rate=asked.learning_rate,
        batch_size=32,
        max_length=asked.max_length,
        train="factors",
        seed=seed,
        progress=False,
    )
    row["finetuned"] = accuracy(model, dev, pad)
    return row | {"finetune_seconds": time.perf_counter() - start}


@torch.no_grad()
def drop_smallest(weight: torch.Tensor) -> None:
    """Set the smaller half of the entries to zero.

    Example:
        >>> weight = torch.tensor([[3.0, -1.0], [0.5, -2.0]])
        >>> drop_smallest(weight)
        >>> weight.tolist()
        [[3.0, 0.0], [0.0, -2.0]]
    """
    weight.mul_(weight.abs() > weight.abs().flatten().median())


def _drawn(rows: list[Row], count: int, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]


@torch.no_grad()
def accuracy(model: Any, rows: list[Row], pad: int, batch_size: int = 64) -> float:
    """Return the share of rows whose class is the likeliest."""
    right = 0
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), batch_size):
        some = ordered[start : start + batch_size]
        ids = [torch.tensor(row["input_ids"]) for row in some]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
        masks = [torch.ones_like(row) for row in ids]
        mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        found = model(input_ids=padded, attention_mask=mask).logits.argmax(-1)
        right += int((found == torch.tensor([row["labels"] for row in some])).sum())
    return right / len(rows)


def table(rows: list[Row]) -> str:
    """Return a Markdown table: means over seeds, with the standard deviation."""
    head = ["scheme", "rank", "of the targets", "pruned", "accuracy", "fine-tuned"]
    head += ["minutes", "tuning"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        mine = [row for row in rows if row["scheme"] == scheme]
        cells = [scheme, str(mine[0].get("rank", "")), f"{mine[0].get('keep_targets', 1):.3f}"]
        cells += [
            _mean([100 * row[key] for row in mine if key in row])
            for key in ("pruned", "accuracy", "finetuned")
        ]
        for key in ("seconds", "finetune_seconds"):
            spent = [row[key] / 60 for row in mine if key in row]
            cells.append(f"{statistics.mean(spent):.1f}" if spent else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
