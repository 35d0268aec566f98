"""Gives freed memory back to the operating system."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys


def release() -> None:
    """Return freed heap pages to the system, where the C library can (glibc).

    Fitting makes large short-lived tensors between small long-lived ones; glibc then keeps the gaps,
    which adds up to more than the model itself.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(ctypes.util.find_library("c") or "libc.so.6"), "malloc_trim", None)
    if trim is not None:
        trim(0)
