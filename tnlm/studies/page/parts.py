"""Pieces of HTML: sortable tables, plots in the reader's colours, key figures."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Placeholder in a plot for the colour of the surrounding text."""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table that is sorted by clicking its column heads; None is an empty cell.

    Example:
        >>> table(["a"], [["x < y"]]).partition("<tbody>")[2]
        '<tr><td>x &lt; y</td></tr></tbody></table></div>'
    """
    heads = "".join(f"<th><button>{escape(name)}</button></th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return f"<td>{escape(value or '')}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number" data-value="{value}">{shown}</td>'


def facts(items: Iterable[tuple[str, str, str]]) -> str:
    """Return key figures side by side, each with a name and a note."""
    found = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in items
    )
    return f'<dl class="facts">{found}</dl>'


def picture(axes: Axes, caption: str) -> str:
    """Return a plot as inline SVG without a background, in the colour of the surrounding text."""
    from matplotlib import rc_context

    _ink(axes)
    text = io.StringIO()
    # Text stays text, which is small and selectable; a fixed salt makes ids reproducible.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tnlm"}):
        axes.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})  # type: ignore[union-attr]
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    label = f'<svg role="img" aria-label="{escape(caption)}" '
    drawn = drawn.replace("<svg ", label, 1)
    return f"<figure>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def _ink(axes: Axes) -> None:
    """Give axes, ticks and text the placeholder colour."""
    for one in axes.figure.axes:
        one.tick_params(colors=INK, which="both")
        for spine in one.spines.values():
            spine.set_edgecolor(INK)
        for label in (one.xaxis.label, one.yaxis.label, one.title):
            if label.get_color() in ("black", "k"):
                label.set_color(INK)
        legend = one.get_legend()
        for word in legend.get_texts() if legend else ():
            word.set_color(INK)


def document(title: str, body: str) -> str:
    """Return a whole page, which needs no other file."""
    here = resources.files("tnlm.studies.page")
    style, script = ((here / file).read_text("utf-8") for file in ("style.css", "sort.js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
"""
