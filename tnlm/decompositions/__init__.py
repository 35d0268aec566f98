"""Formats: the structures that can replace a matrix, one file each, found by looking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tnlm.utils.registry import discover, lookup

if TYPE_CHECKING:  # formats are fitted under metrics, which need linear algebra from here
    from tnlm.decompositions.base import Format


def formats() -> dict[str, Format[Any]]:
    """Return every format by name.

    Example:
        >>> "kronecker" in formats()
        True
    """
    return discover(__name__, "FORMAT")


def get_format(name: str) -> Format[Any]:
    """Return a format by name.

    Raises:
        OptionError: for an unknown name, with the close and the allowed ones.
    """
    found: Format[Any] = lookup("format", name, formats())
    return found
