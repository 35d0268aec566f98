"""Says before the work what the second moments of gradients take, where that is much."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import torch
from torch import nn

from tnlm.errors import CalibrationError
from tnlm.layers.adapters import matrix

logger = logging.getLogger("tnlm")

MUCH = 2**30
"""Bytes of one moment from which on a warning is due."""

COPIES = 3
"""How many moments are held at once: one read, one damped, and what they are multiplied with."""


def check_room(model: nn.Module, modules: Sequence[str]) -> None:
    """Warn of the largest moment of gradients, ``(out, out)`` in float64, before it is gathered.

    Args:
        model: holds the modules.
        modules: dotted names of the linear modules that are watched.

    Raises:
        CalibrationError: if the machine, or the module's GPU, has not so much memory.
    """
    name, rows = max(
        ((name, matrix(model.get_submodule(name)).shape[0]) for name in modules),
        key=lambda found: found[1],
    )
    size = 8 * rows**2
    if size < MUCH:
        return
    what = (
        f"{name} has {rows:,} outputs: the second moment of their gradients takes "
        f"{size / 1e9:.1f} GB, and about {COPIES * size / 1e9:.1f} GB while it is worked with"
    )
    device = next(model.get_submodule(name).parameters()).device
    memory = memory_of(device)
    if COPIES * size > memory:
        raise CalibrationError(
            f"{what}, of {memory / 1e9:.1f} GB on {device}; ignore this module, or take a metric "
            "without such moments: 'input', 'fisher-both'"
        )
    logger.warning("%s; ignore this module if that is too much", what)


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has in all, or more than any has if unknown.

    Example:
        >>> memory_of(torch.device("cpu")) > 2**20
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):  # as on Windows
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
