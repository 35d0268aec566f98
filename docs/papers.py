"""Turns the number of a paper on arXiv into a link, wherever a page of the site names one.

It works on what a page became, not on its text, and so reaches prose, generated lines, docstrings
and the gallery alike.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes

NUMBER = re.compile(r"arXiv[\s:]\s*(\d{4}\.\d{4,5})")
LEFT_ALONE = (nodes.reference, nodes.literal, nodes.literal_block, nodes.title, nodes.raw)
"""What is a link already, code, or a name of a page."""


def link_papers(app: Any, doctree: nodes.document) -> None:
    """Put a link in the place of every number in the running text of a page."""
    for text in list(doctree.findall(nodes.Text)):
        if not _is_within(text, LEFT_ALONE):
            parts = linked(text.astext())
            if len(parts) > 1:
                text.parent.replace(text, parts)


def linked(text: str) -> list[nodes.Node]:
    """Return a text as nodes, a link for every number of a paper.

    Example:
        >>> [node.astext() for node in linked("Monarch (arXiv 2204.00595).")]
        ['Monarch (', 'arXiv 2204.00595', ').']
        >>> linked("arXiv 2204.00595")[1]["refuri"]
        'https://arxiv.org/abs/2204.00595'
    """
    found: list[nodes.Node] = []
    end = 0
    for match in NUMBER.finditer(text):
        found.append(nodes.Text(text[end : match.start()]))
        url = f"https://arxiv.org/abs/{match[1]}"
        found.append(nodes.reference("", f"arXiv {match[1]}", refuri=url, internal=False))
        end = match.end()
    return [*found, nodes.Text(text[end:])]


def _is_within(node: nodes.Node, kinds: tuple[type[nodes.Node], ...]) -> bool:
    parent = node.parent
    while parent is not None:
        if isinstance(parent, kinds):
            return True
        parent = parent.parent
    return False
