"""How examples become a gallery: their order, and what a downloaded notebook starts with."""

from __future__ import annotations

from pathlib import Path

FIRST = "first_compression.py"


class FirstOnTop:
    """Sort the first compression before all others, which follow by name."""

    def __init__(self, folder: str) -> None:
        """Take the folder of the examples, as sphinx-gallery wants it."""

    def __call__(self, name: str) -> tuple[bool, str]:
        """Return the key of a file."""
        return name != FIRST, name


def first_cell(examples: Path) -> str:
    """Return a cell that writes the helper of all examples beside a notebook."""
    return "%%writefile tiny.py\n" + (examples / "tiny.py").read_text(encoding="utf-8").rstrip()
