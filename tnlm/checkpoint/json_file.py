"""Reads the JSON files of a checkpoint: returns an object or raises, whatever they contain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tnlm.errors import CheckpointError

LARGEST = 32 * 2**20
"""Most bytes in a JSON file of a checkpoint; entries of the largest models take a few MB."""
DEEPEST = 64
"""Most levels of nesting; beyond, copying or printing the object could overflow the stack."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: path of a UTF-8 file of at most 32 MiB.

    Raises:
        CheckpointError: if the file cannot be read, is not JSON or not an object, repeats a key, or
            nests too deep.

    Example:
        >>> read_object(Path("no-such.json"))
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such.json is not a file
    """
    try:
        if not path.is_file():  # a pipe or a device would never end
            raise CheckpointError(f"{path} is not a file")
        size = path.stat().st_size
        if size > LARGEST:
            raise CheckpointError(f"{path} has {size:,} bytes; allowed: {LARGEST:,}")
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise CheckpointError(f"{path} nests deeper than {DEEPEST} levels") from error
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not readable JSON: {shortened(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {shortened(value)}, not a JSON object")
    if _depth(value) > DEEPEST:
        raise CheckpointError(f"{path} nests deeper than {DEEPEST} levels")
    return value


def shortened(value: object, length: int = 300) -> str:
    """Return a value as text on one line, shortened to a length.

    Example:
        >>> shortened("many   words", 8)
        'many wor...'
    """
    text = " ".join(str(value)[: 4 * length].split())
    return text if len(text) <= length else f"{text[:length]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"it names {shortened(twice, 60)!r} twice")
    return found


def _depth(value: Any) -> int:
    """Return how many levels a value nests, up to one more than allowed."""
    level, depth = [value], 0
    while level and depth <= DEEPEST:
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        depth += 1
    return depth
