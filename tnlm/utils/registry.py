"""Discovers the objects of a package: one per file, with no list to maintain."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Generic, TypeVar

from tnlm.errors import OptionError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """The named objects that a package's modules define, and those added from outside.

    Args:
        package: dotted name, e.g. ``"tnlm.schemes"``.
        attribute: module-level name of an object or a tuple of objects, e.g. ``"SCHEME"``; modules
            without it are skipped as helpers.
        kind: what errors call the objects.

    Example:
        >>> schemes = Registry("tnlm.schemes", "SCHEME", "scheme")
        >>> schemes.get("kron").name
        'kron'
    """

    def __init__(self, package: str, attribute: str, kind: str) -> None:
        """Import nothing yet; see the class for the arguments."""
        self._package, self._attribute, self.kind = package, attribute, kind
        self._added: dict[str, T] = {}

    @cached_property
    def _found(self) -> dict[str, T]:
        found: dict[str, T] = {}
        for item in self._look():
            if item.name in found:
                raise OptionError(f"two modules of {self._package} define {item.name!r}")
            found[item.name] = item
        return found

    def _look(self) -> Iterator[Any]:
        for info in pkgutil.iter_modules(importlib.import_module(self._package).__path__):
            module = importlib.import_module(f"{self._package}.{info.name}")
            held = getattr(module, self._attribute, ())
            yield from held if isinstance(held, tuple) else (held,)

    def all(self) -> dict[str, T]:
        """Return the objects by ``name``, sorted.

        Raises:
            OptionError: if two modules use the same name.
        """
        return dict(sorted((self._found | self._added).items()))

    def get(self, name: str) -> T:
        """Return an object by name.

        Raises:
            OptionError: if the name is unknown.
        """
        items = self.all()
        if not isinstance(name, str) or name not in items:
            raise OptionError(f"unknown {self.kind} {name!r}{did_you_mean(str(name), items)}")
        return items[name]

    def add(self, item: Any) -> None:
        """Add an object, until the process ends or it is removed.

        Raises:
            OptionError: if its name is taken or invalid.
        """
        if not isinstance(item.name, str) or not item.name:
            raise OptionError(f"a {self.kind} named {item.name!r}; allowed: a non-empty string")
        if item.name in self.all():
            raise OptionError(f"a {self.kind} named {item.name!r} exists already; choose another")
        self._added[item.name] = item

    def remove(self, name: str) -> None:
        """Remove an object that was added.

        Raises:
            OptionError: if no object of this name was added.
        """
        if name not in self._added:
            raise OptionError(f"no {self.kind} {name!r} was added{did_you_mean(name, self._added)}")
        del self._added[name]
