"""Keywords that one function hands on to another: what a misspelt one may mean."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def keywords_of(*functions: Callable[..., Any]) -> list[str]:
    """Return the names of what functions take by keyword.

    Example:
        >>> keywords_of(lambda a, *, b=1, **rest: None)
        ['b']
    """
    return [
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]


def meant(given: Iterable[str], function: Callable[..., Any]) -> str:
    """Return ``"; did you mean 'b'?"`` if a word resembles a keyword of a function, or nothing.

    Example:
        >>> meant(["calibraton"], lambda *, calibration, keep: None)
        "; did you mean 'calibration'?"
    """
    known = keywords_of(function)
    close = [found for word in given for found in difflib.get_close_matches(word, known, n=1)]
    return f"; did you mean {close[0]!r}?" if close else ""
