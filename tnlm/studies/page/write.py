"""Writes an HTML page about a compressed model: request, costs and errors, matrix by matrix."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from tnlm.checkpoint.describing import describe, saved_report
from tnlm.errors import CheckpointError
from tnlm.plans.coverage import Coverage
from tnlm.plans.plan import LayerPlan
from tnlm.plans.report import Report, versions
from tnlm.studies.page.parts import document, facts, picture, table
from tnlm.utils.files import save_text

FILE = "report.html"


def write_page(
    directory: str | Path, out: str | Path | None = None, *, evaluation: str | Path | None = None
) -> Path:
    """Write one self-contained HTML page about a compressed model.

    Args:
        directory: written by ``tnlm.save``, with its ``tnlm_report.json``.
        out: the file to write; ``report.html`` in the directory if not given.
        evaluation: JSON file of a :class:`tnlm.Evaluation` to include.

    Returns:
        The file.

    Raises:
        CheckpointError: if the directory was not written by tnlm or has no report, or if the page
            cannot be written.
        OptionError: if a file has unexpected contents, or matplotlib is missing.
    """
    folder = Path(directory)
    about = describe(folder)
    report = saved_report(folder)
    parts = [*_body(folder.resolve().name, about, report, _measured(evaluation))]
    target = folder / FILE if out is None else Path(out)
    save_text(target, document(folder.resolve().name, "\n".join(parts)))
    return target


def _measured(evaluation: str | Path | None) -> Any:
    if evaluation is None:
        return None
    from tnlm.evaluation.results import Evaluation

    try:
        return Evaluation.from_json(Path(evaluation).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{evaluation} cannot be read: {error}") from error


def _body(name: str, about: dict[str, Any], report: Report, measured: Any) -> Iterator[str]:
    from tnlm.studies import plot

    plan = report.plan
    yield f"<h1>{escape(name)}</h1>"
    yield f'<p class="soft">{escape(about["architecture"] or "")}, scheme {escape(plan.scheme)}</p>'
    yield facts(_figures(report, about))
    if measured is not None:
        yield "<h2>Quality</h2>" + _quality(measured)
    yield "<h2>Parameters kept</h2>"
    yield picture(plot.allocation(plan), "Parameters that each block keeps, and those it had.")
    kept = {layer.name: layer.keep for layer in plan.layers}
    yield picture(
        plot.heatmap(kept, label="fraction kept"),
        "Fraction of parameters kept.",
    )
    errors = {layer.name: layer.error for layer in plan.layers if layer.error is not None}
    if errors:
        yield "<h2>Errors</h2>"
        yield picture(
            plot.heatmap(errors, label="relative error"),
            f"Relative error of each matrix in the metric of its fit: {plan.metric}.",
        )
    yield "<h2>Matrices</h2>"
    yield table(
        ("matrix", "rows", "columns", "format", "options", "kept", "multiply-adds", "error"),
        map(_row, plan.layers),
    )
    if plan.skipped:
        yield "<h2>Left alone</h2>" + table(("matrix", "reason"), plan.skipped.items())
    if plan.coverage is not None:
        yield "<h2>Coverage</h2>" + _coverage(plan.coverage)
    yield "<h2>Recipe</h2>"
    yield f"<pre>{escape(_recipe(report))}</pre>"
    yield "<h2>Model card</h2>"
    yield f"<pre>{escape(card(name, about, report))}</pre>"
    yield "<h2>Environment</h2>"
    here = versions()
    rows = [(package, report.versions.get(package, "unknown"), here[package]) for package in here]
    yield table(("package", "compressed with", "this page"), rows)


def _figures(report: Report, about: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    plan = report.plan
    before, after = plan.model, plan.model_after
    yield "parameters", f"{after.params:,}", f"{after.params / before.params:.1%} of the model"
    kept = plan.targets_after.params / plan.targets_before.params
    yield "of the targets", f"{kept:.1%}", f"{len(plan.layers)} matrices"
    yield "on disk", f"{about['bytes_on_disk'] / 2**20:,.1f} MiB", "weights"
    if before.macs:
        yield "multiply-adds", f"{after.macs / before.macs:.1%}", "per token"
    yield "time", f"{sum(report.seconds.values()):,.0f} s", f"{report.tokens:,} calibration tokens"


def _quality(measured: Any) -> str:
    rows = []
    for result in measured.results:
        for figure in result.figures:
            dense = figure.baseline
            rows.append((result.task, figure.metric, figure.value, figure.stderr, dense, result.n))
    return table(("task", "metric", "value", "standard error", "dense", "items"), rows)


def _row(layer: LayerPlan) -> tuple[Any, ...]:
    options = layer.note or ", ".join(f"{k}={json.dumps(v)}" for k, v in layer.spec.items())
    macs = layer.after.macs / layer.before.macs if layer.before.macs else None
    structure = layer.format or "dense"
    return layer.name, *layer.shape, structure, options, layer.keep, macs, layer.error


def _coverage(covered: Coverage) -> str:
    rows = (
        (each.name, each.kind, each.reason, each.count, each.params, covered.part(each))
        for each in covered.left
    )
    head = ("parameters", "kind", "reason", "tensors", "how many", "of the body")
    return f"<p>{covered.share:.1%} of the body's parameters are targets.</p>" + table(head, rows)


def _recipe(report: Report) -> str:
    plan = report.plan
    first, asked = repr(plan.scheme), {"metric": plan.metric, **plan.request, **report.data}
    if "search" in plan.request:  # its ranks are only in the plan
        first, asked = "report.plan", {**report.data}
    words = "".join(f",\n    {name}={value!r}" for name, value in asked.items())
    if report.data:
        words += ",\n    calibration=...,\n    tokenizer=tokenizer"
    if "recover" in plan.request:
        words += ",\n    training=...,  # if it was given"
    digest = f"\n# SHA-256 of the tokens: {report.fingerprint}" if report.fingerprint else ""
    return f"tnlm.compress(\n    model,\n    {first}{words}\n){digest}"


def card(name: str, about: dict[str, Any], report: Report) -> str:
    """Return a model card in Markdown: front matter and a short text."""
    plan = report.plan
    lines = "\n".join(f"- {line}" for line in report.summary())
    return f"""---
library_name: transformers
tags: [tnlm, compression]
---

# {name}

A {about["architecture"]} compressed with tnlm's scheme `{plan.scheme}`. Load it with
`import tnlm` before `from_pretrained`.

{lines}
"""
