"""What a notebook shows of a result: its totals, and a table that scrolls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

OPEN = 30
"""A table with more rows is folded until it is clicked."""


def fragment(title: str, lines: Iterable[str], rows: Sequence[Sequence[object]] = ()) -> str:
    """Return a title, lines of text and a table as a fragment of HTML.

    Args:
        title: shown in bold.
        lines: shown below it, in the order given.
        rows: cells as text, the headings first; no table if there are none.

    Example:
        >>> fragment("Plan", ["a < b"])
        '<div><strong>Plan</strong><br>a &lt; b</div>'
    """
    text = "".join(f"<br>{escape(line)}" for line in lines)
    return f"<div><strong>{escape(title)}</strong>{text}{_table(rows) if rows else ''}</div>"


def _table(rows: Sequence[Sequence[object]]) -> str:
    head, *body = rows
    heads = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in body
    )
    unfolded = " open" if len(body) <= OPEN else ""
    return (
        f"<details{unfolded}><summary>{len(body)} rows</summary>"
        '<div style="max-height: 28em; overflow: auto"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )
