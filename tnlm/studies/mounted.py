"""A model on which modules are tried, and which has all its own back in the end."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from torch import nn
from transformers import PreTrainedModel

from tnlm.layers.arranged import filled
from tnlm.studies.nested_ranks import Rung
from tnlm.surgery import assemble
from tnlm.targets import Target


class Patient:
    """Puts matrices of a rank into a model and takes them out; on leaving, all are out.

    Args:
        model: what is tried on.
        targets: its matrices, of which some may share a module.
    """

    def __init__(self, model: PreTrainedModel, targets: Sequence[Target]) -> None:
        """Remember the model's own modules."""
        self.model = model
        self.rungs: dict[str, Rung] = {}
        self._groups: dict[str, list[Target]] = {}
        for target in targets:
            self._groups.setdefault(target.module, []).append(target)
        self._own = {module: model.get_submodule(module) for module in self._groups}

    def put(self, target: Target, rung: Rung) -> None:
        """Put a matrix at some rank in the place of its own, or of another rank."""
        self.rungs[target.name] = rung
        self._place(target.module)

    def drop(self, target: Target) -> None:
        """Take a matrix out, so that the model has its own."""
        self.rungs.pop(target.name, None)
        self._place(target.module)

    def bare(self, module: str) -> None:
        """Give the model a module of its own back, until a matrix of it is put or dropped."""
        self.model.set_submodule(module, self._own[module])

    def _place(self, module: str) -> None:
        self.bare(module)
        group = self._groups[module]
        if not any(target.name in self.rungs for target in group):
            return
        parts: dict[str, nn.Module] = {}
        for target in group:
            rung = self.rungs.get(target.name)
            if rung is not None:
                parts[target.name] = rung.fit[1]
            else:
                parts[target.name] = filled(target.weight(self.model), target.bias(self.model))
        self.model.set_submodule(module, assemble(group, parts))

    def __enter__(self) -> Patient:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Give the model all its own modules back."""
        for module in self._groups:
            self.bare(module)
