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
from functools import partial
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
LINES = (128, 256, 512, 1024, 2048)
"""Lengths at which reading is timed: elements of a weight that follow each other in memory."""
LOW, SQUARE = 16, 512
"""Rows of a low and of a square weight, which tell a call's time from that of reading."""
_STREAM = 2**26  # bytes of weights read in a timing: too many for caches
_PART = 2**19  # bytes of those that are timed as one


@dataclass(frozen=True)
class Machine:
    """Times in seconds, for one dtype, device and number of threads.

    Attributes:
        call: time of a small product, independent of its size.
        step: time of any other small operation, such as putting in order.
        loads: times to read one byte of a weight from memory, in a product with one token, if as
            many elements as each of ``LINES`` follow each other; short rows are read more slowly.
        move: time to write one byte of a tensor in another order.
        macs: times of one multiply-add, if the smallest size of the product is each of ``WIDTHS``.
        column_major: whether a product with one token reads a tall weight (more rows than columns)
            faster in column-major order; CPU libraries differ in this.
    """

    call: float
    step: float
    loads: tuple[float, ...]
    move: float
    macs: tuple[float, ...]
    column_major: bool

    def product(
        self,
        tokens: int,
        rows: int,
        columns: int,
        count: int,
        itemsize: int,
        *,
        arranged: bool = True,
    ) -> float:
        """Return the time of ``count`` products of (tokens, columns) with (columns, rows).

        Args:
            tokens: rows of the activation.
            rows: outputs of the weight.
            columns: its inputs.
            count: weights.
            itemsize: bytes per element.
            arranged: whether the weight has the memory layout that is read fastest.

        Example:
            >>> loads = (2e-10,) * 5
            >>> machine = Machine(1e-6, 1e-6, loads, 1e-10, (1e-9, 1e-10, 2e-11, 1e-11), True)
            >>> machine.product(1, 1000, 1000, 1, 4) < machine.product(512, 1000, 1000, 1, 4)
            True
        """
        size = count * rows * columns
        line = max(rows, columns) if arranged and self.column_major else columns
        reading = size * itemsize * _between(LINES, self.loads, max(line, LINES[0]))
        width = min(tokens, rows, columns)
        rate = _between(WIDTHS, self.macs, max(width, WIDTHS[0])) * max(1.0, WIDTHS[0] / width)
        return self.call + max(reading, tokens * size * rate)

    def reorder(self, numbers: int, itemsize: int) -> float:
        """Return the time to write elements in another order."""
        return self.step + numbers * itemsize * self.move


def _between(knots: tuple[int, ...], values: tuple[float, ...], at: int) -> float:
    """Return a value between those known at some sizes, by the logarithm of the size."""
    if at >= knots[-1]:
        return values[-1]
    upper = next(i for i, known in enumerate(knots) if known > at)
    low, high = knots[upper - 1], knots[upper]
    share = math.log(at / low) / math.log(high / low)
    return (1 - share) * values[upper - 1] + share * values[upper]


def machine(dtype: torch.dtype, device: str = "cpu") -> Machine:
    """Return this machine's times, from the file or else measured in a second or two.

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
    call, step, move = (float(stored[name]) for name in ("call", "step", "move"))
    loads, macs = (tuple(map(float, stored[name])) for name in ("loads", "macs"))
    if (len(loads), len(macs)) != (len(LINES), len(WIDTHS)):
        raise ValueError(
            f"{len(loads)} loads for {len(LINES)} lines, {len(macs)} rates for {len(WIDTHS)} widths"
        )
    return Machine(call, step, loads, move, macs, bool(stored["column_major"]))


def probe(dtype: torch.dtype, device: str = "cpu") -> Machine:
    """Measure the times, in a second or two.

    Example:
        >>> min(probe(torch.float32).loads) > 0
        True
    """
    with torch.inference_mode():
        few = torch.ones(1, SQUARE, dtype=dtype, device=device)
        order = torch.arange(SQUARE, device=device)
        call, loads, columns = _reading(dtype, device)
        return Machine(
            call=call,
            step=_seconds(lambda: few.index_select(-1, order), device),
            loads=loads,
            move=_moving(dtype, device),
            macs=tuple(_per_multiply_add(width, dtype, device) for width in WIDTHS),
            column_major=columns,
        )


def _reading(dtype: torch.dtype, device: str) -> tuple[float, tuple[float, ...], bool]:
    """Time one token through weights from memory.

    Returns:
        The seconds of a call, those for a byte at each of the line lengths, and whether a tall
        weight is read faster in column-major order.
    """
    weights = torch.ones(_STREAM // dtype.itemsize, dtype=dtype, device=device)
    tall = list(weights.view(-1, LINES[-1], SQUARE))
    across = [weight.view(SQUARE, LINES[-1]).t() for weight in tall]
    by_rows, by_columns = _least([tall, across], device)
    columns = device == "cpu" and by_columns < 0.9 * by_rows
    # In column-major order no weight has shorter rows than columns.
    shapes = [(min(line, SQUARE) if columns else SQUARE, line) for line in LINES]
    # The lowest is large enough to take the same way through the library as the others.
    rings = [list(weights.view(-1, *shape)) for shape in [(LOW, SQUARE), *shapes]]
    low, *found = _least(rings, device)
    # Rings of one line length, all of the same bytes, differ by the number of their calls.
    more = len(rings[0]) - len(rings[1 + LINES.index(SQUARE)])
    call = max(0.0, (low - found[LINES.index(SQUARE)]) / more)
    # No faster than half of what was measured, whatever a call took.
    loads = (max(t / 2, t - call * len(ring)) for t, ring in zip(found, rings[1:], strict=True))
    return call, tuple(each / _STREAM for each in loads), columns


def _least(rings: list[list[Tensor]], device: str) -> list[float]:
    """Return the seconds in which one token goes through all weights of each ring."""
    parts = [_parts(ring) for ring in rings]
    # In alternation, since the load of the machine varies, and other work seldom meets the same
    # short part at every turn.
    turns = [[[_seconds(part, device, 1) for part in ring] for ring in parts] for _ in range(5)]
    return [sum(map(min, zip(*ring, strict=True))) for ring in zip(*turns, strict=True)]


def _parts(ring: list[Tensor]) -> list[Callable[[], object]]:
    """Return tasks that multiply one token by every weight, some at a time."""
    x = torch.ones(1, ring[0].shape[1], dtype=ring[0].dtype, device=ring[0].device)
    count = max(1, _PART // (ring[0].numel() * ring[0].element_size()))
    return [partial(_through, x, ring[at : at + count]) for at in range(0, len(ring), count)]


def _through(x: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        F.linear(x, weight)


def _moving(dtype: torch.dtype, device: str) -> float:
    """Return the time to write a byte in another order: of channels, and of two axes."""
    rows, side = 64, 24
    tensor = torch.ones(rows, side, side, dtype=dtype, device=device)
    order = torch.arange(side * side, device=device).flip(0).expand(rows, -1)
    by_axes = _seconds(lambda: tensor.transpose(1, 2).contiguous(), device)
    by_order = _seconds(lambda: tensor.view(rows, -1).gather(-1, order), device)
    return (by_axes + by_order) / 2 / (tensor.numel() * dtype.itemsize)


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
