"""Writes an HTML page about an analysis: pictures first, then every matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tnlm.studies.analysis.result import Analysis
from tnlm.studies.analysis.weights import WeightRow
from tnlm.studies.page.parts import document, facts, picture, table
from tnlm.utils.files import save_text
from tnlm.utils.names import place, shortened

FILE = "analysis.html"
COLUMNS = {
    "name": "matrix",
    "outputs": "rows",
    "inputs": "columns",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
    "ratio90": "directions for 90 %",
    "above_edge": "above noise",
    "features_centered_ratio90": "features: directions for 90 %",
}


def write_analysis(found: Analysis, out: str | Path, *, before: Analysis | None = None) -> Path:
    """Write one self-contained HTML page about an analysis.

    Args:
        found: the result of :func:`tnlm.analyze`.
        out: the file to write.
        before: the same analysis of the dense model, if the model is compressed.

    Returns:
        The file.

    Raises:
        CheckpointError: if the page cannot be written.
        OptionError: if matplotlib is missing.
    """
    title = f"Analysis of {found.protocol.get('model', 'a model')}"
    target = Path(out)
    save_text(target, document(title, "\n".join(_body(title, found, before))))
    return target


def _body(title: str, found: Analysis, before: Analysis | None) -> Iterator[str]:
    from tnlm.studies import plot

    yield f"<h1>{escape(title)}</h1>"
    yield facts(_figures(found))
    yield "<h2>Weights</h2>"
    yield picture(
        plot.energy(_spectra(found.weights)),
        "Energy that the leading directions of the weights hold, mean of each kind of matrix; the "
        "dotted lines are at 90 %.",
    )
    yield picture(plot.heatmap(found), "Fraction of the directions that hold 90 % of the energy.")
    if found.features:
        yield "<h2>Features</h2>"
        compared = before is not None and before.features
        given: Any = {"before": before, "after": found} if compared else found
        yield picture(
            plot.features(given),
            "Fraction of the directions that hold 90 % of the energy of the centred outputs, mean "
            "of each block.",
        )
    yield "<h2>Matrices</h2>"
    yield table(list(COLUMNS.values()), [[row.get(key) for key in COLUMNS] for row in found.rows])
    if found.curves:
        yield "<h2>Errors of formats</h2>" + _errors(found)
    if found.skipped:
        yield "<h2>Left out</h2>" + table(("matrix", "reason"), found.skipped.items())
    yield "<h2>Protocol</h2>"
    yield table(("option", "value"), [(k, str(v)) for k, v in found.protocol.items()])


def _figures(found: Analysis) -> Iterator[tuple[str, str, str]]:
    ratios = [row.spectrum.ratio90 for row in found.weights]
    yield "matrices", f"{len(found.weights):,}", "analyzed"
    if ratios:
        yield "weights", f"{median(ratios):.0%}", "of the directions hold 90 %, median"
    centred = [r.spectrum.ratio90 for r in found.features if r.centered and not r.without_top]
    if centred:
        yield "features", f"{median(centred):.0%}", "of the directions hold 90 %, median"
        yield "data", f"{found.protocol.get('tokens', 0):,}", "tokens"


def _spectra(rows: tuple[WeightRow, ...]) -> Mapping[str, Any]:
    """Return the mean spectrum of every kind of matrix."""
    kinds: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        if row.spectrum.held:
            kinds.setdefault(place(row.name)[0], []).append(row.spectrum.held)
    names = shortened(list(kinds))
    means = {kind: np.mean(held, axis=0) for kind, held in kinds.items()}
    return {names[kind]: np.maximum(np.diff(mean), 0.0) for kind, mean in means.items()}


def _errors(found: Analysis) -> str:
    head = ("matrix", "format", "metric", "kept", "error")
    rows = [(r.name, r.format, r.metric, r.keep, r.error) for r in found.curves]
    return table(head, rows)
