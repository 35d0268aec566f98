"""What was measured of a scheme, from the figures beside the benchmark pages."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent / "benchmarks"

Row = dict[str, Any]


def measured(scheme: str) -> list[str]:
    """Return the paragraphs and tables of a scheme's figures, or nothing."""
    return [*_quality(scheme), *_classification(scheme)]


def headline() -> str:
    """Return what `auto` costs without training, in one sentence, for the home page."""
    rows = _rows("quality")
    [dense] = [row for row in rows if row["scheme"] == "dense"]
    at = {(row["scheme"], row["asked"]): row for row in rows if "error" not in row}
    cost = {asked: at["auto", asked]["wiki"] / dense["wiki"] for asked in (0.9, 0.8, 0.6)}
    whole = at["auto", 0.8]["parameters"] / dense["parameters"]
    return (
        f"**Perplexity × {cost[0.8]:.2f} at 0.8 of the linear weights, without training.** That is "
        f"`auto` on SmolLM2-135M-Instruct and WikiText-2, with {whole:.2f} of the whole model; at "
        f"0.9 of the linear weights it is × {cost[0.9]:.2f}, at 0.6 × {cost[0.6]:.2f}. Plain SVD "
        "of the same size destroys the model ([all methods, and the command]"
        "(/benchmarks/quality.md)).\n"
    )


def _quality(scheme: str) -> list[str]:
    rows = _rows("quality")
    [dense] = [row for row in rows if row["scheme"] == "dense"]
    mine = [row for row in rows if row["scheme"] == scheme and "error" not in row]
    if not mine:
        return []
    mine.sort(key=lambda row: float(row["keep_targets"]), reverse=True)
    lines = [
        "| linear weights kept | whole model | WikiText-2 | C4 | seconds to plan and fit |",
        "|---|---|---|---|---|",
    ]
    for row in mine:
        spent = sum(seconds for name, seconds in row["seconds"].items() if name != "calibrate")
        cells = [f"{row['keep_targets']:.3f}", f"{row['parameters'] / dense['parameters']:.3f}"]
        cells += [_ratio(row[text] / dense[text]) for text in ("wiki", "c4")]
        lines.append(f"| {' | '.join([*cells, f'{spent:.0f}'])} |")
    told = (
        "Perplexity of SmolLM2-135M-Instruct as a ratio to the dense model, without training "
        "([protocol and command](/benchmarks/quality.md)):"
    )
    return [told, "\n".join(lines)]


def _ratio(value: float) -> str:
    return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"


def _classification(scheme: str) -> list[str]:
    rows = _rows("classification")
    mine = [row for row in rows if row["scheme"] == scheme]
    if not mine:
        return []
    [dense] = [row for row in rows if row["scheme"] == "dense"]
    before, after = (
        f"{100 * statistics.mean(row[key] for row in mine):.1f} %"
        for key in ("accuracy", "finetuned")
    )
    return [
        f"Accuracy of a small BERT on SST-2 with a third of its rank, {len(mine)} seeds: {before} "
        f"without and {after} with fine-tuning; dense {100 * dense['accuracy']:.1f} % "
        "([protocol and command](/benchmarks/classification.md))."
    ]


def _rows(name: str) -> list[Row]:
    found: list[Row] = json.loads((BENCHMARKS / f"{name}.json").read_text())
    return found
