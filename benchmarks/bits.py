"""Bits and structure on one footing: perplexity against bytes and multiply-adds, resumable.

    python benchmarks/off_grid.py MODEL ROTATED       # weights off the grid of a 4-bit file
    python benchmarks/bits.py ROTATED OUT --calibration train.txt --text wiki=test.txt \
        --text c4=c4.jsonl [--recipe auto-bytes:keep_targets=0.2]

The model is read in bfloat16, against whose bytes all are counted. Results are appended to
OUT/bits.jsonl as they come, and are not measured again; OUT/bits.md is the table.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.schemes import get_scheme

logger = logging.getLogger("bits")

RECIPES = (
    "dense",
    "rtn:group=64",
    "gptq:precision=int8",
    "auto:keep_targets=0.8",
    "auto:keep_targets=0.8,precision=int8",
    "gptq",
    "auto-bytes:keep_targets=0.2656,group=64",
    "auto:keep_targets=0.8,precision=int5",
    "gptq:precision=int3",
    "auto-bytes:keep_targets=0.2032,group=64,formats=[]",
    "auto-bytes:keep_targets=0.2032,group=64",
    "auto-bytes:keep_targets=0.2032",
)
"""A scheme each, with its options after a colon."""
Row = dict[str, Any]


def main() -> None:
    """Measure what is missing, then write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asked = _arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "bits.jsonl"
    rows = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    for recipe in asked.recipe:
        if recipe in {row["recipe"] for row in rows}:
            continue
        rows.append({"recipe": recipe, **measured(recipe, asked)})
        with results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    ordered = [row for recipe in asked.recipe for row in rows if row["recipe"] == recipe]
    (asked.out / "bits.md").write_text(table(ordered))
    logger.info("%s", table(ordered))


def measured(recipe: str, asked: argparse.Namespace) -> Row:
    """Return what a recipe keeps, its perplexities and its seconds."""
    model, tokenizer = load_model(asked.model, dtype=torch.bfloat16)
    name, _, options = recipe.partition(":")
    row: Row = {"bytes": 1.0, "macs": 1.0}
    if name != "dense":
        chosen = dict(_option(part) for part in options.split(",") if part)
        if get_scheme(name).needs_calibration:
            chosen |= {"calibration": asked.calibration, "tokenizer": tokenizer}
            chosen["cache_dir"] = asked.out / "cache"
        scheme = tnlm.scheme(name, formats=tuple(chosen.pop("formats", get_scheme(name).formats)))
        start = time.perf_counter()
        tnlm.compress(model, scheme, progress=False, **chosen)
        row["seconds"] = round(time.perf_counter() - start)
        plan = tnlm.report(model).plan
        for unit in ("bytes", "macs"):
            row[unit] = getattr(plan.targets_after, unit) / getattr(plan.targets_before, unit)
    for text in asked.text:
        label, _, path = text.partition("=")
        found = tnlm.perplexity(model, Path(path), tokenizer, window=512, windows=16)
        row[label] = found.perplexity
    return row


def _option(part: str) -> tuple[str, Any]:
    key, _, value = part.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of perplexities and their ratios to dense.

    Example:
        >>> rows = [{"recipe": "dense", "bytes": 1.0, "macs": 1.0, "wiki": 10.0},
        ...         {"recipe": "gptq", "bytes": 0.25, "macs": 1.0, "wiki": 11.0}]
        >>> print(table(rows).splitlines()[-1])
        | gptq | 0.250 | 1.000 | 11.00 (1.1000) |
    """
    texts = [key for key in rows[0] if key not in ("recipe", "bytes", "macs", "seconds")]
    lines = ["| recipe | bytes | multiply-adds | " + " | ".join(texts) + " |"]
    lines.append("|---" * (3 + len(texts)) + "|")
    for row in rows:
        found = [f"{row[text]:.2f} ({row[text] / rows[0][text]:.4f})" for text in texts]
        cells = [row["recipe"], f"{row['bytes']:.3f}", f"{row['macs']:.3f}", *found]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    return parser.parse_args()


if __name__ == "__main__":
    main()
