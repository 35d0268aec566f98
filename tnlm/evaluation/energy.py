"""Energy counters of the machine, if they exist and can be read."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")

Meter = Callable[[], dict[str, float]]


def meter(device: torch.device) -> Meter | None:
    """Return a function that reads energy counters in joules, or None if there are none.

    For a CPU, these are RAPL's counters of whole packages, which include other work on the machine.
    For a CUDA device, it is the device's counter, read through NVML if ``pynvml`` is installed.

    Args:
        device: device of the model.
    """
    return _nvml(device) if device.type == "cuda" else rapl()


def rapl(folder: Path = POWERCAP) -> Meter | None:
    """Return a function that reads the packages' counters, or None if they cannot be read."""
    files = [path / "energy_uj" for path in sorted(folder.glob("intel-rapl:[0-9]*"))]
    packages = [file for file in files if file.parent.name.count(":") == 1]

    def read() -> dict[str, float]:
        return {str(file.parent): int(file.read_text()) / 1e6 for file in packages}

    try:
        return read if read() else None
    except (OSError, ValueError):
        return None


def spent(before: dict[str, float], after: dict[str, float]) -> float:
    """Return the joules between two readings; the range of a counter is added if it wrapped.

    Example:
        >>> spent({"a": 1.0}, {"a": 3.5})
        2.5
    """
    total = 0.0
    for name, start in before.items():
        used = after[name] - start
        total += used if used >= 0 else used + _range(Path(name))
    return total


def _range(package: Path) -> float:
    """Return the value at which a counter wraps, in joules."""
    try:
        return int((package / "max_energy_range_uj").read_text()) / 1e6
    except (OSError, ValueError):
        return 0.0


def _nvml(device: torch.device) -> Meter | None:
    """Return a function that reads a CUDA device's counter, or None if there is none."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)

        def read() -> dict[str, float]:
            return {uuid: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}

        read()
    except (nvml.NVMLError, AttributeError):
        return None
    return read
