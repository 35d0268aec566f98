"""Times of the parts of a matrix product on this machine: measured once, then read from a file."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tnlm.utils.files import write_file

logger = logging.getLogger("tnlm")

HOME = "TNLM_HOME"
"""Environment variable for the folder of the measurements; ``~/.cache/tnlm`` by default."""
WIDTHS = (4, 16, 64, 256)
"""Inner sizes at which products are timed."""
_STREAM = 2**26  # bytes of weights read in a timing: too many for caches


@dataclass(frozen=True)
class Machine:
    """Times in seconds, for one dtype, device and number of threads.

    Attributes:
        call: time of a small product, independent of its size.
        load: time to read one byte of a weight from memory, in a product with one token.
        move: time to write one byte of a tensor in another order.
        macs: times of one multiply-add, if the smallest size of the product is each of ``WIDTHS``.
        column_major: whether a product with one token reads a tall weight (more rows than columns)
            faster in column-major order; CPU libraries differ in this.
    """

    call: float
    load: float
    move: float
    macs: tuple[float, ...]
    column_major: bool

    def product(self, tokens: int, rows: int, columns: int, count: int, itemsize: int) -> float:
        """Return the time of ``count`` products of (tokens, columns) with (columns, rows).

        Example:
            >>> machine = Machine(1e-6, 1e-10, 1e-10, (1e-9, 1e-10, 2e-11, 1e-11), True)
            >>> machine.product(1, 1000, 1000, 1, 4) < machine.product(512, 1000, 1000, 1, 4)
            True
        """
        work = count * tokens * rows * columns
        reading = count * rows * columns * itemsize * self.load
        return self.call + max(reading, work * self._rate(min(tokens, rows, columns)))

    def reorder(self, numbers: int, itemsize: int) -> float:
        """Return the time to write elements in another order."""
        return self.call + numbers * itemsize * self.move

    def _rate(self, width: int) -> float:
        """Return the time of one multiply-add, interpolated between the measured widths."""
        if width >= WIDTHS[-1]:
            return self.macs[-1]
        upper = next(i for i, known in enumerate(WIDTHS) if known > width)
        if upper == 0:
            return self.macs[0] * WIDTHS[0] / width
        low, high = WIDTHS[upper - 1], WIDTHS[upper]
        share = math.log(width / low) / math.log(high / low)
        return math.exp(
            (1 - share) * math.log(self.macs[upper - 1]) + share * math.log(self.macs[upper])
        )


def machine(dtype: torch.dtype, device: str = "cpu") -> Machine:
    """Return this machine's times, from the file or else measured in about a second.

    Args:
        dtype: dtype of weights and activations.
        device: a device type, such as ``"cpu"`` or ``"cuda"``.
    """
    return _known_or_measured(dtype, device, torch.get_num_threads())


@functools.cache
def _known_or_measured(dtype: torch.dtype, device: str, threads: int) -> Machine:
    path, key = _file(), key_of(dtype, device, threads)
    known = _read(path)
    try:
        return parse(known[key])
    except (LookupError, TypeError, ValueError):
        # In a separate thread, where the caller's autocast, fake tensors and counters do not apply.
        with ThreadPoolExecutor(1) as aside:
            measured = aside.submit(probe, dtype, device).result()
        _write(path, {**_read(path), key: asdict(measured)})
        return measured


def parse(stored: Any) -> Machine:
    """Return times from an entry of the file; a broken one raises what reading it raises."""
    call, load, move = (float(stored[name]) for name in ("call", "load", "move"))
    macs = tuple(float(rate) for rate in stored["macs"])
    if len(macs) != len(WIDTHS):
        raise ValueError(f"{len(macs)} rates for {len(WIDTHS)} widths")
    return Machine(call, load, move, macs, bool(stored["column_major"]))


def probe(dtype: torch.dtype, device: str = "cpu") -> Machine:
    """Measure the times, in about a second.

    Example:
        >>> probe(torch.float32).load > 0
        True
    """
    with torch.inference_mode():
        tall, wide, columns = _stream(dtype, device)
        itemsize = torch.empty(0, dtype=dtype).element_size()
        tensor = torch.ones(64, 128, 128, dtype=dtype, device=device)
        tiny, few = (torch.ones(n, 16, dtype=dtype, device=device) for n in (16, 1))
        return Machine(
            call=_seconds(lambda: F.linear(few, tiny), device),
            load=min(tall, wide) / _STREAM,
            move=_seconds(lambda: tensor.transpose(0, 2).contiguous(), device)
            / (tensor.numel() * itemsize),
            macs=tuple(_per_multiply_add(width, dtype, device) for width in WIDTHS),
            column_major=device == "cpu" and columns < 0.9 * tall,
        )


def _stream(dtype: torch.dtype, device: str) -> tuple[float, float, float]:
    """Time one token through weights from memory: tall, wide, and tall in column-major order."""
    short, long = 512, 2048
    count = _STREAM // (short * long * torch.empty(0, dtype=dtype).element_size())
    weights = torch.ones(count, long, short, dtype=dtype, device=device)
    few, many = (torch.ones(1, n, dtype=dtype, device=device) for n in (short, long))

    def through(x: Tensor, parts: list[Tensor]) -> Callable[[], object]:
        return lambda: [F.linear(x, part) for part in parts]

    tall = list(weights)
    wide = list(weights.view(count, short, long))
    columns = [part.t() for part in wide]
    tasks = [through(few, tall), through(many, wide), through(few, columns)]
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(9):  # in alternation, since the load of the machine varies
        for task, found in zip(tasks, times, strict=True):
            found.append(_seconds(task, device, repeats=1))
    by_rows, across, by_columns = (min(found) for found in times)
    return by_rows, across, by_columns


def _per_multiply_add(width: int, dtype: torch.dtype, device: str) -> float:
    rows, out = 1024, 256
    x = torch.ones(rows, width, dtype=dtype, device=device)
    weight = torch.ones(out, width, dtype=dtype, device=device)
    return _seconds(lambda: F.linear(x, weight), device) / (rows * width * out)


def _seconds(task: Callable[[], object], device: str, repeats: int = 25) -> float:
    """Return the minimum time of a task, since other work on the machine can only add to it."""
    times = []
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        task()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def key_of(dtype: torch.dtype, device: str, threads: int) -> str:
    """Return the name of this machine's times in the file."""
    cuda = device == "cuda"
    name = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    return f"{platform.node()} {name} torch {torch.__version__} {device} {threads} threads {dtype}"


def _file() -> Path:
    return Path(os.environ.get(HOME, "~/.cache/tnlm")).expanduser() / "machine.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    """Write the file atomically, since other processes may be reading it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(known, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        logger.info("the measurements of this machine cannot be saved to %s: %s", path, error)
