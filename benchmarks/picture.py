"""Draws quality against size from the measured tables: docs/_static/quality.svg.

python benchmarks/picture.py docs/benchmarks/quality.json docs/_static/quality.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import rc_context

from tnlm import plot


def main() -> None:
    """Read the rows, draw one line for each scheme, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", default="wiki", help="the text whose perplexity is drawn")
    parser.add_argument("--most", type=float, default=100.0, help="perplexity left out above")
    asked = parser.parse_args()
    rows = [row for row in json.loads(asked.rows.read_text()) if "error" not in row]
    (dense,) = [row for row in rows if row["scheme"] == "dense"]
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row is not dense and row[asked.text] <= asked.most:
            point = row["parameters"] / 1e6, row[asked.text]
            points.setdefault(row["scheme"], []).append(point)
    ax = plot.pareto(
        points,
        dense=(dense["parameters"] / 1e6, dense[asked.text]),
        size="parameters of the whole model, millions",
        quality=f"perplexity on {asked.text}",
    )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "tnlm"}):
        ax.figure.savefig(asked.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
