"""Sizes as people write them: 6GB, 1.5 GiB, or a number of bytes."""

from __future__ import annotations

import re

from tnlm.errors import OptionError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def bytes_of(size: int | float | str, argument: str) -> int:
    """Return a size in bytes.

    Args:
        size: a number of bytes, or a text with a unit: kB, MB, GB, TB, or KiB and so on.
        argument: the keyword that it was given for.

    Raises:
        OptionError: if it is no size.

    Example:
        >>> bytes_of("6GB", "memory"), bytes_of("1.5 MiB", "memory"), bytes_of(10, "memory")
        (6000000000, 1572864, 10)
    """
    found = _SIZE.fullmatch(str(size).strip())
    if found is None or isinstance(size, bool) or float(found[1]) <= 0:
        raise OptionError(
            f"{argument}={size!r}; allowed: a number of bytes, or a text such as '6GB' or '6GiB'",
            argument=argument,
        )
    unit = _UNITS[found[2].lower()]
    if found[3]:
        unit = {10**3: 2**10, 10**6: 2**20, 10**9: 2**30, 10**12: 2**40}.get(unit, unit)
    return int(float(found[1]) * unit)


def in_words(size: int) -> str:
    """Return a size for people, rounded up.

    Example:
        >>> in_words(1_234_000_000), in_words(52_100_000), in_words(1_200)
        ('1.24 GB', '53 MB', '1 MB')
    """
    if size >= 10**9:
        return f"{-(-size // 10**7) / 100:.2f} GB"
    return f"{-(-size // 10**6)} MB"
