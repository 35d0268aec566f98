"""Restricts a scheme to what a runtime executes."""

from __future__ import annotations

from dataclasses import replace

from tnlm.errors import OptionError
from tnlm.runtimes import get_runtime
from tnlm.schemes import schemes
from tnlm.schemes.base import Scheme


def portable(scheme: Scheme, name: str | None) -> Scheme:
    """Return a scheme whose results a runtime executes without tnlm.

    Args:
        scheme: the scheme asked for.
        name: of the runtime; None for no restriction.

    Raises:
        OptionError: for an unknown runtime, or a scheme that has no structure for it.

    Example:
        >>> from tnlm.schemes import get_scheme
        >>> portable(get_scheme("auto"), "llama.cpp").formats
        ('channels', 'heads')
    """
    if name is None or scheme.precision is not None:  # which is refused beside a runtime
        return scheme
    runtime = get_runtime(name)
    kept = tuple(each for each in scheme.formats if each in runtime.formats)
    if not kept:
        good = [
            name
            for name, each in schemes().items()
            if set(each.formats) & set(runtime.formats) and each.precision is None
        ]
        raise OptionError(
            f"portable={name!r} with scheme {scheme.name!r}: it does not execute "
            f"{', '.join(scheme.formats)}; allowed schemes: {', '.join(good)}",
            argument="portable",
        )
    multiple = {"multiple": runtime.multiple} if "channels" in kept else {}
    return replace(
        scheme,
        formats=kept,
        allocation=runtime.allocation or scheme.allocation,
        defaults={**scheme.defaults, **multiple},
    )
