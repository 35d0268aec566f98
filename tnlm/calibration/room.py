"""Warns before calibration if second moments of gradients need much memory."""

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
"""Size of a moment, in bytes, from which there is a warning."""

COPIES = 3
"""Number of moments in memory at once: the one read, its damped copy, and a product."""


def check_room(model: nn.Module, modules: Sequence[str]) -> None:
    """Warn about the largest moment of gradients, ``(out, out)`` in float64, before gathering.

    Args:
        model: the model with the modules.
        modules: dotted names of the watched modules.

    Raises:
        CalibrationError: if the machine, or the module's GPU, does not have enough memory.
    """
    found = {name: model.get_submodule(name) for name in modules}
    # Modules of experts have no weight of their own; their outputs are as wide as the model.
    sizes = {n: matrix(module).shape[0] for n, module in found.items() if hasattr(module, "weight")}
    name = max(sizes, key=sizes.__getitem__, default="")
    rows = sizes.get(name, 0)
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
    """Return the total memory of a device in bytes, or a huge value if unknown.

    Example:
        >>> memory_of(torch.device("cpu")) > 2**20
        True
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):  # as on Windows
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
