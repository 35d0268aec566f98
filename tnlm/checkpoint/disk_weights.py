"""Weights that stay in a checkpoint's files and are read when they are needed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tnlm.checkpoint.raw import Place, read
from tnlm.checkpoint.skeleton import placeholder
from tnlm.utils.memory import release
from tnlm.utils.residency import offload

LARGE = 2**20
"""Bytes of freed weights from which on their memory is returned to the system."""


class DiskWeights:
    """Reads the weights of a model's modules from files, and frees them.

    Args:
        places: where every parameter is.
        scratch: folder for temporary files; None for the system's.
    """

    def __init__(self, places: Mapping[nn.Parameter, Place], scratch: Path | None) -> None:
        """Start with all weights on disk."""
        self.scratch = scratch
        self.identity = _identity(places)
        self._places = places
        self._uses: Counter[nn.Parameter] = Counter()

    def load(self, module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
        """Read the weights of a module, and of all inside it, and return the parameters."""
        found = [each for each in module.parameters(recurse) if each in self._places]
        for parameter in found:
            self._uses[parameter] += 1
            if self._uses[parameter] == 1:
                parameter.data = read(self._places[parameter]).to(parameter.dtype)
        return found

    def free(self, parameters: Sequence[nn.Parameter]) -> None:
        """Free what :meth:`load` has read, unless another caller still needs it."""
        freed = 0
        for parameter in parameters:
            self._uses[parameter] -= 1
            if not self._uses[parameter]:
                freed += parameter.nbytes
                parameter.data = placeholder(parameter)
        if freed >= LARGE:
            release()


def read_when_called(model: nn.Module, weights: DiskWeights, units: Sequence[str]) -> None:
    """Let some modules, when they are called, read their weights and free them afterwards.

    Args:
        model: its weights are on disk.
        weights: reads them.
        units: modules that are read as a whole, such as blocks; of all others each reads its own.
    """
    offload(model, weights)
    inside = tuple(f"{unit}." for unit in units)
    for name, module in model.named_modules():
        alone = any(True for _ in module.parameters(recurse=False)) and not name.startswith(inside)
        if name in units or alone:
            before, after = _hooks(weights, name in units)
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)


def _hooks(weights: DiskWeights, whole: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return what runs before and after a module; plain functions, which copies of it share."""
    held: list[list[nn.Parameter]] = []

    def before(module: nn.Module, _: Any) -> None:
        held.append(weights.load(module, whole))

    def after(*_: Any) -> None:
        weights.free(held.pop())

    return before, after


def _identity(places: Mapping[nn.Parameter, Place]) -> str:
    """Return a hash of which files hold the weights: names, sizes and times of change."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({place.file for place in places.values()}):
        about = file.stat()
        digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()
