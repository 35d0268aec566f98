"""Allocations, which split a budget across matrices: one file each, discovered automatically."""

from __future__ import annotations

from tnlm.allocation.base import Allocation
from tnlm.utils.registry import Registry

ALLOCATIONS: Registry[Allocation] = Registry(__name__, "ALLOCATION", "allocation")


def allocations() -> dict[str, Allocation]:
    """Return every allocation by name.

    Example:
        >>> "loss" in allocations()
        True
    """
    return ALLOCATIONS.all()


def get_allocation(name: str) -> Allocation:
    """Return an allocation by name.

    Raises:
        OptionError: if the name is unknown.
    """
    return ALLOCATIONS.get(name)
