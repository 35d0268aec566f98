"""Checks of arguments that are numbers."""

from __future__ import annotations

import math
from typing import TypeGuard

from tnlm.errors import OptionError, TnlmError


def check_whole(
    argument: str,
    value: object,
    least: int = 1,
    most: int | None = None,
    *,
    error: type[TnlmError] = OptionError,
) -> None:
    """Raise an error unless a value is a whole number within bounds; ``True`` is not one.

    Args:
        argument: name of the value in the error.
        value: the value given.
        least: the smallest value allowed.
        most: the largest value allowed, if there is one.
        error: the class to raise.

    Raises:
        OptionError: or ``error``, for any other value.

    Example:
        >>> check_whole("groups", 0)
        Traceback (most recent call last):
        tnlm.errors.OptionError: groups=0; allowed: a whole number of at least 1
        >>> check_whole("d", True, 1, 9)
        Traceback (most recent call last):
        tnlm.errors.OptionError: d=True; allowed: a whole number from 1 to 9
    """
    if is_whole(value) and least <= value and (most is None or value <= most):
        return
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise error(f"{argument}={value!r}; allowed: a whole number {bounds}", argument=argument)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number; ``True`` is not one.

    Example:
        >>> is_whole(3), is_whole(3.0), is_whole(True)
        (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number; ``True`` is not one.

    Example:
        >>> is_real(3), is_real(0.5), is_real(float("nan")), is_real(True)
        (True, True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
