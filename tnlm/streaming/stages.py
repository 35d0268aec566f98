"""The memory of each stage of a run, from shapes alone; the factors are measured upper bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tnlm.compression.request import Request
from tnlm.metrics.measure import FISHER, GRADIENTS, INPUTS
from tnlm.targets.base import Target

ROOTS = 6
"""How many float64 matrices a metric holds for one side: moment, damped, eigenvectors, root."""
LOGITS = 5
"""How many float32 tensors of the size of the logits a loss and its gradient hold."""
ACTIVATIONS = 3
"""How many float32 tensors of each matrix's input and output a pass through a block holds."""


@dataclass(frozen=True)
class Shapes:
    """What the memory of a run depends on.

    Attributes:
        targets: the chosen matrices, by block; those outside of blocks by None.
        blocks: bytes of every block, and under None of all outside.
        outside: bytes of the largest tensor outside the blocks.
        itemsize: bytes of one weight.
        vocabulary: outputs of the head.
        tokens: tokens of one window; 0 without data.
    """

    targets: dict[str | None, list[Target]]
    blocks: dict[str | None, int]
    outside: int
    itemsize: int
    vocabulary: int
    tokens: int

    @property
    def largest(self) -> int:
        """Bytes of the largest block."""
        return max(size for name, size in self.blocks.items() if name is not None)

    @property
    def all_targets(self) -> list[Target]:
        """All chosen matrices."""
        return [target for found in self.targets.values() for target in found]


def stages(shapes: Shapes, request: Request) -> dict[str, int]:
    """Return the most bytes that each stage adds to what the process holds."""
    found = {"check": _check(shapes), "fit": _fit(shapes, request), "write": _write(shapes)}
    if request.looks_at_data:
        found["gather"] = _gather(shapes, request)
    if request.cascade != "none":
        found["fit"] += 2 * shapes.largest + _activations(shapes)
        if request.refines:  # in float32: a block, its gradients, two moments, a copy; and a graph
            found["fit"] += 5 * 4 * shapes.largest // shapes.itemsize + 2 * _activations(shapes)
    return found


def statistics_bytes(targets: Sequence[Target], request: Request) -> int:
    """Return the bytes of the statistics of matrices on disk, where symmetric ones are halved.

    An input that several matrices share counts for each.
    """
    total = 0
    for target in targets:
        rows, columns = target.shape
        total += 2 * (columns + 1) ** 2 + 24 * columns if INPUTS in request.needs else 0
        total += (rows + 1) ** 2 + 8 * rows if _is_full(request) else 0
        total += 4 * target.params if FISHER in request.needs else 0
    return total


def _sums(targets: Sequence[Target], request: Request) -> int:
    """Return the bytes of the same statistics while they are summed, in float64."""
    total = 0
    for target in targets:
        rows, columns = target.shape
        total += 8 * columns**2 if INPUTS in request.needs else 0
        total += 8 * rows**2 if _is_full(request) else 0
        total += 4 * target.params if FISHER in request.needs else 0
    return total


def _is_full(request: Request) -> bool:
    """Return whether whole second moments of gradients are gathered."""
    gathering = request.measure.gathering.get(GRADIENTS, {})
    return GRADIENTS in request.needs and gathering.get("moment") == "full"


def _check(shapes: Shapes) -> int:
    return max(target.params for target in shapes.all_targets) * (shapes.itemsize + 5)


def _write(shapes: Shapes) -> int:
    return max(shapes.largest, shapes.outside)


def _fit(shapes: Shapes, request: Request) -> int:
    """Return the bytes of the largest fit: the matrix, its copies, and its metric."""
    rounding = 4 if request.grids != (None,) else 1  # float64 copies that rounding makes
    copies = max((structure.copies for structure in request.structures), default=rounding)
    most = 0
    for target in shapes.all_targets:
        rows, columns = target.shape
        size = target.params * request.share * (8 * copies + shapes.itemsize)
        size += 8 * ROOTS * columns**2 if INPUTS in request.needs else 0
        size += 8 * ROOTS * rows**2 if _is_full(request) else 0
        size += 8 * target.params if FISHER in request.needs else 0
        most = max(most, int(size))
    return most


def _gather(shapes: Shapes, request: Request) -> int:
    """Return the bytes of a walk: a block with its sums, or the tables around the blocks."""
    inside = [found for name, found in shapes.targets.items() if name is not None]
    sums = max((_sums(found, request) for found in inside), default=0)
    graph = 2 if request.needs & {GRADIENTS, FISHER} else 1
    one = max((max(t.shape) for t in shapes.all_targets), default=0)
    block = shapes.largest + sums + 2 * 8 * one**2 + graph * _activations(shapes)
    head = shapes.outside
    if graph == 2:  # the head's weights and the logits, and three blocks that are tried
        head += LOGITS * 4 * shapes.tokens * shapes.vocabulary + 3 * shapes.largest
        block += 4 * max(t.params for t in shapes.all_targets) if FISHER in request.needs else 0
    return max(block, head)


def _activations(shapes: Shapes) -> int:
    widths = max((sum(sum(t.shape) for t in each) for each in shapes.targets.values()), default=0)
    return ACTIVATIONS * 4 * shapes.tokens * widths
