"""The device that a caller means."""

from __future__ import annotations

import os

import torch

from tnlm.errors import OptionError


def device_of(given: str | torch.device | None) -> torch.device:
    """Return a device on which tensors can be made.

    Without an index it is that of ``LOCAL_RANK``, which ``torchrun`` sets, so that several
    processes use several devices.

    Args:
        given: a device, or the name of one; None for the CPU.

    Raises:
        OptionError: if there is no such device here.

    Example:
        >>> device_of("cpu"), device_of(None)
        (device(type='cpu'), device(type='cpu'))
    """
    try:
        device = torch.device("cpu" if given is None else given)
        if device.type == "meta":
            raise ValueError("tensors on it have no values")
        if device.index is None and device.type != "cpu" and "LOCAL_RANK" in os.environ:
            count = torch.get_device_module(device).device_count()
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]) % max(count, 1))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise OptionError(
            f"device={given!r} cannot be used: {reason}; allowed here: {', '.join(_here())}",
            argument="device",
        ) from error
    return device


def _here() -> list[str]:
    """Return the names of the devices of this machine."""
    found = torch.accelerator.current_accelerator(check_available=True)
    names = [] if found is None else range(torch.accelerator.device_count())
    return ["cpu", *(f"{found}:{index}" for index in names)]
