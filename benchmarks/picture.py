"""Draws quality against size from the measured tables: docs/_static/quality.svg.

python benchmarks/picture.py docs/benchmarks/quality.json docs/_static/quality.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context, ticker

from tnlm import plot

OURS = "auto"
NEAR = 1.06
"""Points of one size whose perplexities are within this factor share a label."""

Row = dict[str, Any]


def main() -> None:
    """Read the rows, draw ours as a line and the others as points, and write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", default="wiki", help="the text whose perplexity is drawn")
    parser.add_argument("--most", type=float, default=200.0, help="perplexity left out above")
    asked = parser.parse_args()
    found = [row for row in json.loads(asked.rows.read_text()) if "error" not in row]
    rows = [row for row in found if row[asked.text] <= asked.most and ":" not in row["scheme"]]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "tnlm", "svg.fonttype": "none"}):
        draw(rows, asked.text).savefig(asked.out, metadata={"Date": None}, bbox_inches="tight")


def draw(rows: list[Row], text: str) -> Any:
    """Return the figure."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault(row["scheme"], []).append((_size(row), row[text]))
    (dense,) = points.pop("dense")
    words = {"size": "parameters of the whole model, millions", "quality": f"perplexity on {text}"}
    axes = plot.pareto(points, dense=dense, **words)
    for drawn in list(axes.get_lines()):
        if drawn.get_label() in points:  # ours apart from all others
            drawn.set_color("C0" if drawn.get_label() == OURS else "C1")
        elif drawn.get_label() == "Pareto front":
            drawn.remove()  # sizes differ by rounding, so that it would hold what is beaten
    handles = [line for line in axes.get_lines() if line.get_label() == "dense"]
    axes.legend(handles=handles, frameon=False, loc="upper left")
    for names, size, value in labels([row for row in rows if row["scheme"] in points], text):
        axes.annotate(names, (size, value), (9, 2), textcoords="offset points", fontsize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.FixedLocator([40, 60, 80, 100, 140, 200]))
    axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    return axes.figure


def labels(rows: list[Row], text: str) -> Iterator[tuple[str, float, float]]:
    """Yield the names of points that lie close together, with a size and a perplexity."""
    ordered = sorted(rows, key=lambda row: (round(_size(row) / 4), row[text]))
    groups: list[list[Row]] = []
    for before, row in zip([None, *ordered], ordered, strict=False):
        if before and abs(_size(row) - _size(before)) < 2 and row[text] < NEAR * before[text]:
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        middle = group[len(group) // 2]
        yield ", ".join(row["scheme"] for row in group), _size(group[-1]), middle[text]


def _size(row: Row) -> float:
    return float(row["parameters"]) / 1e6


if __name__ == "__main__":
    main()
