"""Decisions and costs as lines of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tnlm.tensors.network import Cost

if TYPE_CHECKING:
    from tnlm.plans.plan import LayerPlan

HEADINGS = ("target", "shape", "format", "spec", "params", "MACs", "error")


def table(layers: Iterable[LayerPlan]) -> list[str]:
    """Return decisions as lines with aligned columns."""
    rows = [HEADINGS, *map(row, layers)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows]


def row(layer: LayerPlan) -> tuple[str, ...]:
    """Return the table row of one decision."""
    spec = layer.note or " ".join(f"{k}={_short(v)}" for k, v in layer.spec.items())
    error = "" if layer.error is None else f"{layer.error:.4f}"
    macs = (
        f"{layer.after.macs / layer.before.macs:.3f}"
        if layer.before.macs
        else f"{layer.after.macs}"
    )
    shape = f"{layer.shape[0]}x{layer.shape[1]}"
    return layer.name, shape, layer.format or "dense", spec, f"{layer.keep:.3f}", macs, error


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def change(before: Cost, after: Cost) -> str:
    """Return a line that compares two costs."""
    parts = []
    for name in ("params", "bytes", "macs"):
        old, new = getattr(before, name), getattr(after, name)
        parts.append(
            f"{name} {old:,} -> {new:,} ({new / old:.3f})" if old else f"{name} 0 -> {new:,}"
        )
    return ", ".join(parts)
