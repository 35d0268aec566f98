"""Where compressed models run without tnlm: one file a runtime, found by looking."""

from __future__ import annotations

from tnlm.runtimes.base import Runtime
from tnlm.utils.registry import Registry

RUNTIMES: Registry[Runtime] = Registry(__name__, "RUNTIME", "runtime")


def runtimes() -> dict[str, Runtime]:
    """Return every runtime by name.

    Example:
        >>> runtimes()["llama.cpp"].multiple
        32
    """
    return RUNTIMES.all()


def get_runtime(name: str) -> Runtime:
    """Return a runtime by name.

    Raises:
        OptionError: for an unknown name, with the close and the allowed ones.
    """
    return RUNTIMES.get(name)
