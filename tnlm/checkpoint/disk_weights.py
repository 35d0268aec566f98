"""Weights that stay in a checkpoint's files and are read when they are needed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tnlm.checkpoint.raw import Place, read
from tnlm.utils.memory import release
from tnlm.utils.residency import offload

LARGE = 2**20
"""Bytes of freed weights from which on their memory is returned to the system."""


class DiskWeights:
    """Reads the weights of a model's modules from files, and frees them.

    A parameter that is read is a new one in the place of the model's own, which has no values. So
    a graph that holds it stays right after it was freed.

    Args:
        model: a skeleton.
        places: where every parameter is.
        scratch: folder for temporary files; None for the system's.
    """

    def __init__(
        self, model: nn.Module, places: Mapping[nn.Parameter, Place], scratch: Path | None
    ) -> None:
        """Start with all weights on disk."""
        self.scratch = scratch
        self.identity = _identity(places)
        self._places = places
        self._uses: Counter[nn.Parameter] = Counter()
        self._empty: dict[nn.Parameter, nn.Parameter] = {}
        self._full: dict[nn.Parameter, nn.Parameter] = {}
        self._owners: dict[nn.Parameter, dict[nn.Module, str]] = {each: {} for each in places}
        for module in model.modules():
            list(self._known(module))

    def load(self, module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
        """Read the weights of a module, and of all inside it, and return the parameters."""
        modules = module.modules() if recurse else [module]
        found = dict.fromkeys(each for owner in modules for each in self._known(owner))
        for parameter in found:
            self._uses[parameter] += 1
            if self._uses[parameter] == 1:
                values = read(self._places[parameter]).to(parameter.device, parameter.dtype)
                full = nn.Parameter(values, parameter.requires_grad)
                self._full[parameter], self._empty[full] = full, parameter
                self._put(parameter, parameter, full)
        return list(found)

    def free(self, parameters: Sequence[nn.Parameter]) -> None:
        """Free what :meth:`load` has read, unless another caller still needs it."""
        freed = 0
        for parameter in parameters:
            self._uses[parameter] -= 1
            if not self._uses[parameter]:
                full = self._full.pop(parameter)
                del self._empty[full]
                self._put(parameter, full, parameter)
                freed += parameter.nbytes
        if freed >= LARGE:
            release()

    def _known(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """Yield the parameters of a module that are in the files, and remember whose they are."""
        for name, held in module._parameters.items():
            if held is not None:
                parameter = self._empty.get(held, held)
                if parameter in self._places:
                    self._owners[parameter][module] = name
                    yield parameter

    def _put(self, parameter: nn.Parameter, old: nn.Parameter, new: nn.Parameter) -> None:
        """Replace what stands for a parameter in all modules that have it."""
        for module, name in self._owners[parameter].items():
            if module._parameters.get(name) is old:
                module._parameters[name] = new


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
