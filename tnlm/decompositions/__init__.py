"""Formats: the structures that can replace a matrix, one file each, found by looking."""

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
        OptionError: for an unknown name, with the close and the allowed ones.
    """
    return FORMATS.get(name)
