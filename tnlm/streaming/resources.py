"""What a run needs of memory and disk, said before it starts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tnlm.compression.choices import Asked
from tnlm.compression.request import Request
from tnlm.errors import CapacityError
from tnlm.evaluation.footprint import resident_bytes
from tnlm.metrics.measure import FISHER, GRADIENTS
from tnlm.streaming.blocks import tensors_of
from tnlm.streaming.size import in_words
from tnlm.streaming.stages import Shapes, stages, statistics_bytes
from tnlm.targets.base import Selector, Target
from tnlm.targets.ends import vocabulary_of
from tnlm.targets.selection import select

OVERHEAD = 150 * 10**6
"""Bytes for libraries that are loaded during a run, and for memory that is not given back."""

EACH = 10**6
"""Bytes that stay in memory of each block: modules without values, entries, decisions."""
UNKNOWN = 500 * 10**6
"""Bytes that the process is taken to hold where the system does not say."""


@dataclass(frozen=True)
class Resources:
    """What a run needs.

    Attributes:
        now: bytes of memory that the process holds already.
        stages: the most bytes that each stage adds, by name.
        scratch: bytes of temporary files.
        read: bytes read from the model's files.
        written: bytes written to the result, at most.
    """

    now: int
    stages: dict[str, int]
    scratch: int
    read: int
    written: int

    @property
    def peak(self) -> int:
        """The most memory that the process will hold."""
        return self.now + max(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in bytes."""
        return {**asdict(self), "peak": self.peak}

    def lines(self) -> list[str]:
        """Return the figures as text, one line each."""
        stages = [f"{name}: {in_words(self.now + more)}" for name, more in self.stages.items()]
        return [
            f"peak memory: {in_words(self.peak)} ({', '.join(stages)})",
            f"temporary files: at most {in_words(self.scratch)}",
            f"read: {in_words(self.read)}; written: at most {in_words(self.written)}",
        ]


def needed(
    model: PreTrainedModel,
    blocks: Sequence[str],
    request: Request,
    asked: Asked,
    targets: Selector | None,
    ignore: Selector | None,
) -> Resources:
    """Return what a run needs whose targets are still to be chosen; see :func:`resources`."""
    chosen = request.scheme.targets if targets is None else targets
    found = select(model, chosen, ignore, split=request.scheme.split).targets
    cut = asked.calibration.cut
    windows: tuple[int, ...] = (0, 0)
    if request.looks_at_data:
        windows = (cut.num_samples, cut.max_length)
    windows += (cut.gradient_samples,) if request.needs & {GRADIENTS, FISHER} else ()
    return resources(model, blocks, found, request, windows)


def resources(
    model: PreTrainedModel,
    blocks: Sequence[str],
    targets: Sequence[Target],
    request: Request,
    windows: tuple[int, ...] = (0, 0),
) -> Resources:
    """Return what a run needs, from the shapes of the model alone.

    Args:
        model: a skeleton.
        blocks: names of its blocks.
        targets: the chosen matrices.
        request: says how they are fitted.
        windows: how many windows of data, the tokens of each, and how many are for gradients.
    """
    count, tokens, *few = windows
    names: list[str | None] = [*blocks, None]
    sizes = {name: _size(model, tensors_of(model, name, blocks)) for name in names}
    by_block: dict[str | None, list[Target]] = {
        name: [t for t in targets if t.module.startswith(f"{name}.")] for name in blocks
    }
    known = {target.name for found in by_block.values() for target in found}
    by_block[None] = [target for target in targets if target.name not in known]
    shapes = Shapes(
        by_block,
        sizes,
        max((parameter.nbytes for parameter in model.parameters()), default=0),
        max(target.weight(model).element_size() for target in targets),
        vocabulary_of(model) or 0,
        tokens,
    )
    always = OVERHEAD + EACH * len(blocks)
    work = {name: more + always for name, more in stages(shapes, request).items()}
    whole = sum(sizes.values())
    passes = _passes(request)
    widest = max(target.shape[1] for target in targets)
    width = getattr(model.config.get_text_config(), "hidden_size", widest)
    states = 3 * count + (len(blocks) + 4) * sum(few)  # gradients need every block's input
    hidden = 4 * tokens * width * states
    scratch = 2 * whole + statistics_bytes(targets, request) + hidden
    return Resources(resident_bytes() or UNKNOWN, work, scratch, passes * whole, whole)


def _passes(request: Request) -> int:
    """Return how often the weights are read: for checks, plans, fits, copies and walks."""
    if not request.looks_at_data:
        return 3
    forward = 5 + (4 if request.cascade != "none" else 0)
    return 3 + forward + (7 if request.needs & {GRADIENTS, FISHER} else 0)


def check_resources(found: Resources, memory: int | None, scratch: Path) -> None:
    """Raise `CapacityError` if a run needs more memory than a cap, or more disk than is free."""
    if memory is not None and found.peak > memory:
        stage = max(found.stages, key=lambda name: found.stages[name])
        raise CapacityError(
            f"memory={in_words(memory)}, but the stage {stage!r} needs {in_words(found.peak)}, "
            f"{in_words(found.now)} of which the process holds already; give at least "
            f"memory='{-(-found.peak // 10**6)}MB', or ignore the largest matrices",
            argument=("memory", "ignore"),
        )
    free = shutil.disk_usage(scratch).free
    if found.scratch > free:
        raise CapacityError(
            f"the run needs up to {in_words(found.scratch)} for temporary files and the result, "
            f"but {scratch} has {in_words(free)}; make room, or give another scratch=",
            argument="scratch",
        )


def _size(model: PreTrainedModel, names: Sequence[str]) -> int:
    return sum(model.get_parameter_or_buffer(name).nbytes for name in names)
