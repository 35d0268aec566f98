"""Returns freed memory to the operating system."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys
from collections import Counter
from collections.abc import Callable

from torch import nn


def release() -> None:
    """Return freed heap pages to the system, where the C library can (glibc).

    Fits allocate large short-lived tensors between small long-lived ones; glibc keeps the gaps,
    which add up to more than the model itself.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache  # finding a library starts a process, and a fit takes less time than that
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6")
    return getattr(library, "malloc_trim", None)


def unmap(model: nn.Module) -> None:
    """Copy a model's weights out of a memory-mapped checkpoint file.

    Tensors loaded from safetensors share one mapping of the whole file, which stays resident while
    any of them is alive. Call this once the large weights are gone: it copies the remaining ones,
    so that the mapping can be released.
    """
    parameters = list(model.parameters())
    uses = Counter(p.untyped_storage().data_ptr() for p in parameters)
    for parameter in parameters:
        if parameter.is_cpu and uses[parameter.untyped_storage().data_ptr()] == 1:
            parameter.data = parameter.data.clone()
