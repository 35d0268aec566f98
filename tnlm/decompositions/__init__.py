"""Formats, the structures that can replace a matrix: one file each, discovered automatically."""

from __future__ import annotations

from typing import Any

from tnlm.decompositions.base import Format
from tnlm.utils.registry import Registry

FORMATS: Registry[Format[Any]] = Registry(__name__, "FORMAT", "format")


def formats() -> dict[str, Format[Any]]:
    """Return every format by name.

    Example:
        >>> "kronecker" in formats()
        True
    """
    return FORMATS.all()


def get_format(name: str) -> Format[Any]:
    """Return a format by name.

    Raises:
        OptionError: if the name is unknown.
    """
    return FORMATS.get(name)
