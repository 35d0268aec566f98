"""The prices of a machine: measured on this one, or read from the file of another."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tnlm.errors import OptionError
from tnlm.layers.machine import Machine, key_of, machine, parse

logger = logging.getLogger("tnlm")

ENDING = re.compile(r" (?P<device>\S+) \d+ threads torch\.(?P<dtype>\w+)$")
"""How the name of a machine ends, as `tnlm.layers.machine.key_of` writes it."""


@dataclass(frozen=True)
class Prices:
    """Times of a machine, and the machine, threads and dtype for which they hold.

    Attributes:
        name: node, processor, torch, device, threads and dtype, as in the file of measurements.
        times: the times.
    """

    name: str
    times: Machine

    @property
    def own(self) -> bool:
        """Whether they were measured on this machine, with this process's number of threads."""
        device, dtype = _kind_of(self.name)
        if device == "cuda" and not torch.cuda.is_available():
            return False
        return self.name == key_of(dtype, device, torch.get_num_threads())

    def to_dict(self) -> dict[str, Any]:
        """Return them as plain values, such as a file of measurements has."""
        times = asdict(self.times)
        return {self.name: {n: list(t) if isinstance(t, tuple) else t for n, t in times.items()}}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Prices:
        """Return prices from the plain values of :meth:`to_dict`; broken ones raise an error.

        Raises:
            LookupError, TypeError, ValueError: if the name or the times cannot be read.
        """
        ((name, times),) = values.items()
        _kind_of(name)
        return cls(name, parse(times))


def own_prices(dtype: torch.dtype, device: str = "cpu") -> Prices:
    """Return the prices of this machine, for the number of threads of this process."""
    return Prices(key_of(dtype, device, torch.get_num_threads()), machine(dtype, device))


def read_prices(path: str | Path, dtype: torch.dtype, device: str = "cpu") -> Prices:
    """Read prices for a dtype and device from a file of measurements, ``machine.json``.

    Those for this process's number of threads are taken; a warning says so if they were measured
    on another machine.

    Raises:
        OptionError: if the file cannot be read, or does not have exactly one machine with such
            prices.
    """
    known = _entries(path)
    ending = f" {device} {torch.get_num_threads()} threads {dtype}"
    found = [name for name in known if name.endswith(ending)]
    own = key_of(dtype, device, torch.get_num_threads())
    chosen = [own] if own in found else found
    if len(chosen) != 1:
        raise OptionError(
            f"prices={str(path)!r} has prices for {', '.join(sorted(known)) or 'no machine'}; "
            f"needed: those of one machine for{ending}",
            argument="prices",
        )
    try:
        prices = Prices.of({chosen[0]: known[chosen[0]]})
    except (LookupError, TypeError, ValueError) as error:
        raise OptionError(
            f"prices={str(path)!r}: broken entry for {chosen[0]}: {error}", argument="prices"
        ) from error
    if not prices.own:
        logger.warning("times are predicted for %s, which is not this machine", prices.name)
    return prices


def _entries(path: str | Path) -> Mapping[str, Any]:
    try:
        known = json.loads(Path(path).expanduser().read_text())
    except (OSError, ValueError, TypeError) as error:
        raise OptionError(
            f"prices={str(path)!r} cannot be read: {error}; give a machine.json that tnlm wrote",
            argument="prices",
        ) from error
    if not isinstance(known, dict):
        raise OptionError(f"prices={str(path)!r} is not a file of prices", argument="prices")
    return known


def _kind_of(name: str) -> tuple[str, torch.dtype]:
    """Return the device and dtype in the name of prices."""
    ending = ENDING.search(name)
    dtype = getattr(torch, ending["dtype"], None) if ending else None
    if ending is None or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{name!r} does not end with the device, threads and dtype of the prices, such as "
            "'cpu 8 threads torch.float32'"
        )
    return ending["device"], dtype
