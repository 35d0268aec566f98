"""What a scheme takes, by its metric and its formats, from costs.toml.

Tests compare the numbers and multiply-adds stated there with what networks count.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from tnlm.metrics.measure import FISHER, GRADIENTS, INPUTS
from tnlm.metrics.named import get_measure
from tnlm.schemes.base import Scheme

TOLD = tomllib.loads((Path(__file__).parent / "costs.toml").read_text())


def cost(scheme: Scheme) -> list[str]:
    """Return the paragraphs of a page on what a scheme takes."""
    needs = set(get_measure(scheme.metric).needs)
    if scheme.allocation == "loss" and not needs & {GRADIENTS, FISHER}:
        needs |= {INPUTS, GRADIENTS}
    passes = "; ".join(text for kind, text in TOLD["data"].items() if kind in needs)
    lines = [f"- **Data**: {passes or 'none is looked at'}.{_cascade(scheme)}"]
    several = len(scheme.formats) > 1
    for name in (each for each in scheme.formats if each in TOLD["formats"]):
        of, told = f", {name}" if several else "", TOLD["formats"][name]
        fit = told["fit"] + (" " + TOLD["least_squares"] if told.get("improves") else "")
        lines += [f"- **Fit{of}**: {fit}", f"- **Result{of}**: {told['result']}"]
    text = "\n".join(line.replace("\n", " ") for line in lines)
    return ["For an m×n matrix, outputs by inputs:", text]


def _cascade(scheme: Scheme) -> str:
    if scheme.cascade == "none":
        return ""
    anchored = scheme.cascade == "anchored"
    return (
        f" The cascade then runs every block, {'as it was and ' if anchored else ''}as it is so "
        "far, for every group of fitted matrices that share an input, and sums the moment of the "
        f"compressed inputs{', and their product with the dense ones' if anchored else ''}. "
        f"Statistics of one block are held at a time.{_refinement(scheme)}"
    )


def _refinement(scheme: Scheme) -> str:
    passes = scheme.refine_passes
    if not passes:
        return ""
    return (
        f" Each block is then trained for {passes} passes over seven of eight windows, each pass a "
        f"forward and a backward run, in float32 with two moments for each trained parameter."
    )
