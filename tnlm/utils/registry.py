"""Finds what a package holds by looking: one object a file, no list to keep."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from tnlm.errors import OptionError, did_you_mean


@cache
def discover(package: str, attribute: str) -> dict[str, Any]:
    """Import the modules of a package and collect the object that each keeps under a name.

    Args:
        package: dotted name, e.g. ``"tnlm.schemes"``.
        attribute: the module-level name looked for, e.g. ``"SCHEME"``; modules without it are
            helpers and are passed over.

    Returns:
        The objects by their own ``name``, sorted.

    Raises:
        OptionError: if two modules use the same name.
    """
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        item = getattr(module, attribute, None)
        if item is None:
            continue
        if item.name in found:
            raise OptionError(f"{module.__name__} and another module both define {item.name!r}")
        found[item.name] = item
    return dict(sorted(found.items()))


def lookup(kind: str, name: str, items: dict[str, Any]) -> Any:
    """Return ``items[name]``, or raise an error that names the close and the allowed ones."""
    if not isinstance(name, str) or name not in items:
        raise OptionError(f"unknown {kind} {name!r}{did_you_mean(str(name), items)}")
    return items[name]
