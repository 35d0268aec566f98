"""Mounts replacements of matrices on a model for a trial, and restores the model afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from tnlm.layers.arranged import filled
from tnlm.targets.base import Member
from tnlm.utils.mounting import modules_kept


@contextmanager
def mounting(model: nn.Module, targets: Sequence[Member]) -> Iterator[Mounted]:
    """Restore the modules of all targets after a block in which replacements are mounted.

    Args:
        model: any model; its own modules are left untouched.
        targets: the matrices that may be replaced.

    Yields:
        What mounts and removes the replacements.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> from tnlm.targets.matrix import MatrixTarget
        >>> with mounting(model, [MatrixTarget("0", "0", (2, 2))]) as mounted:
        ...     mounted.put({"0": nn.Linear(2, 2, bias=False)})
        ...     model[0].bias is None
        True
        >>> model[0].bias is None
        False
    """
    with modules_kept(model, dict.fromkeys(target.module for target in targets)) as own:
        yield Mounted(model, targets, own)


class Mounted:
    """A model with some of its matrices replaced; see :func:`mounting`."""

    def __init__(
        self, model: nn.Module, targets: Sequence[Member], own: Mapping[str, nn.Module]
    ) -> None:
        """Start with nothing replaced."""
        self._model, self._own = model, own
        self._targets = {target.name: target for target in targets}
        self._replacements: dict[str, nn.Module] = {}

    def put(self, replacements: Mapping[str, nn.Module]) -> None:
        """Mount replacements, given by the names of their matrices."""
        self._replacements.update(replacements)
        for module in dict.fromkeys(self._targets[name].module for name in replacements):
            self._assemble(module)

    def drop(self, name: str) -> None:
        """Remove the replacement of a matrix, if it has one."""
        self._replacements.pop(name, None)
        self._assemble(self._targets[name].module)

    def bare(self, name: str) -> None:
        """Restore the module of a matrix until one of its replacements is next put or dropped."""
        module = self._targets[name].module
        self._model.set_submodule(module, self._own[module])

    def _assemble(self, module: str) -> None:
        """Mount all replacements of one module; its other parts keep their values."""
        own, model = self._own[module], self._model
        model.set_submodule(module, own)
        chosen = next(each for each in self._targets.values() if each.module == module)
        group = chosen.siblings
        if not any(target.name in self._replacements for target in group):
            return
        parts = {
            target.name: self._replacements[target.name]
            if target.name in self._replacements
            else filled(target.weight(model), target.bias(model))
            for target in group
        }
        trainable = any(parameter.requires_grad for parameter in own.parameters())
        new = group[0].assemble(group, parts).requires_grad_(trainable).train(own.training)
        model.set_submodule(module, new)
