"""The text that Python ships: its library's sources, and the topics of its help.

Every installation has it, so a benchmark that learns from it needs no download. What is read
depends on Python's version alone, which is why the text has a digest.
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

PASSED = ("test", "tests", "idle_test", "site-packages", "_bundled", "encodings", "pydoc_data")
"""Folders that are passed over: tests, what pip installed, tables of characters."""
ONE_IN = 16
"""One document in so many is held out."""
PIECE = 2000
"""Characters of a piece at most."""


@dataclass(frozen=True)
class PythonText:
    """Pieces of documents in random order, and the digest of them all.

    Attributes:
        training: most of the documents.
        held_out: pieces of documents none of which is in ``training``.
    """

    training: list[str]
    held_out: list[str]

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.training, self.held_out]).encode()).hexdigest()[:8]


def python_text(seed: int = 0) -> PythonText:
    """Read the text; which documents are held out follows from their names.

    Example:
        >>> text = python_text()
        >>> len(text.training) > 8 * len(text.held_out) > 0
        True
    """
    found: dict[bool, list[str]] = {False: [], True: []}
    for name, document in sorted({**dict(_sources()), **topics}.items()):
        chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % ONE_IN == 0
        found[chosen] += _pieces(document)
    for pieces in found.values():
        random.Random(seed).shuffle(pieces)
    return PythonText(found[False], found[True])


def _sources() -> Iterator[tuple[str, str]]:
    """Yield the library's modules by their names in it."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        built = name.parts[0].startswith(("config-", "_sysconfigdata"))  # differs by machine
        if not built and not set(PASSED).intersection(name.parts):
            yield name.as_posix(), path.read_text(encoding="utf-8", errors="ignore")


def _pieces(document: str) -> list[str]:
    r"""Cut a document at the ends of lines.

    Example:
        >>> [len(piece) for piece in _pieces("a line\n" * 500)]
        [1995, 1505]
    """
    pieces, held, size = [], [], 0
    for line in document.splitlines(keepends=True):
        if held and size + len(line) > PIECE:
            pieces.append("".join(held))
            held, size = [], 0
        held.append(line)
        size += len(line)
    return [*pieces, "".join(held)] if held else pieces
