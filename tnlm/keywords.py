"""Keywords that one function hands on to another: what a misspelt one may mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from tnlm.errors import OptionError, did_you_mean


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


def check_keywords(name: str, given: Iterable[str], *functions: Callable[..., Any]) -> None:
    """Raise `OptionError` for what none of the functions takes.

    Args:
        name: of the function that was called.
        given: keywords.
        functions: what the keywords are for.
    """
    known = keywords_of(*functions)
    for word in given:
        if word not in known:
            raise OptionError(f"{name} takes no {word!r}{did_you_mean(word, known)}")
