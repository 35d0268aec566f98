"""Named schemes, published combinations of format, metric and defaults: one file each."""

from __future__ import annotations

from tnlm.schemes.base import Scheme
from tnlm.utils.registry import Registry

SCHEMES: Registry[Scheme] = Registry(__name__, "SCHEME", "scheme")


def schemes() -> dict[str, Scheme]:
    """Return every scheme by name.

    Example:
        >>> schemes()["svd-llm"].metric
        'input'
    """
    return SCHEMES.all()


def list_schemes() -> list[str]:
    """Return the names of all schemes.

    Example:
        >>> "kron" in list_schemes()
        True
    """
    return list(schemes())


def get_scheme(name: str) -> Scheme:
    """Return a scheme by name.

    Raises:
        OptionError: if the name is unknown.
    """
    return SCHEMES.get(name)
