"""Replaces modules, and can restore everything if a step fails."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from tnlm.utils.spill import Slot, Spill
from tnlm.utils.undo import Snapshot


class Swap:
    """Replaces modules, and can undo all of it, including attributes and configs.

    The weights of replaced modules are moved to a temporary file, so that memory holds the model
    only once.

    Example:
        >>> from tnlm.utils.undo import attempt
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> swap = Swap(model)
        >>> attempt(lambda: swap.replace("0", nn.Identity()), swap.undo)
        >>> model[0]
        Identity()
        >>> attempt(lambda: swap.replace("1", nn.Identity()), swap.undo)
        Traceback (most recent call last):
        AttributeError: Sequential has no attribute `1`
        >>> model[0]
        Linear(in_features=2, out_features=2, bias=True)
    """

    def __init__(self, model: nn.Module) -> None:
        """Record the model."""
        self._model = model
        self._before = Snapshot(model)
        self._spill = Spill()
        self._weights: dict[nn.Parameter, Slot | Tensor] = {}
        self._biases: dict[nn.Parameter, Tensor] = {}
        self._uses = Counter(p.untyped_storage().data_ptr() for p in model.parameters())

    def spill(self, name: str) -> None:
        """Move a module's weight to a file, before its replacement.

        A weight whose memory is shared with another parameter stays, since moving frees nothing.

        Raises:
            CheckpointError: if the disk is full.
        """
        weight = self._model.get_submodule(name)._parameters.get("weight")
        if weight is not None and weight not in self._weights:
            shared = self._uses[weight.untyped_storage().data_ptr()] > 1
            self._weights[weight] = weight.data if shared else self._spill.put(weight)
            weight.data = weight.data.new_empty(0)

    def replace(self, name: str, module: nn.Module) -> None:
        """Replace a module, and move the old one's weight to a file."""
        self.spill(name)
        bias = self._model.get_submodule(name)._parameters.get("bias")
        if bias is not None and bias not in self._biases:
            # The new module may hold and train the same bias.
            self._biases[bias] = bias.detach().clone()
        self._model.set_submodule(name, module)

    def undo(self) -> None:
        """Restore every module and weight; can be repeated after an interruption."""
        for weight, held in self._weights.items():
            weight.data = held if isinstance(held, Tensor) else self._spill.take(held)
        for bias, values in self._biases.items():
            bias.data.copy_(values)
        self._before.restore()


class Shelf:
    """Keeps fitted modules in a temporary file until all are ready to be installed.

    Example:
        >>> shelf = Shelf()
        >>> shelf.put("a", nn.Linear(2, 3))
        >>> shelf.take("a")
        Linear(in_features=2, out_features=3, bias=True)
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Start empty; the file is in a folder, or else in the system's temporary directory."""
        self._modules: dict[str, tuple[nn.Module, torch.device]] = {}
        self._slots: dict[str, dict[str, Slot]] = {}
        self._spill = Spill(folder)

    def put(self, name: str, module: nn.Module) -> None:
        """Move a module's tensors to a file.

        Raises:
            CheckpointError: if the disk is full.
        """
        device = next(module.parameters()).device
        self._slots[name] = {k: self._spill.put(v) for k, v in module.state_dict().items()}
        self._modules[name] = module.to("meta"), device

    def take(self, name: str) -> nn.Module:
        """Return a module, with its tensors back on their device."""
        module, device = self._modules.pop(name)
        module.to_empty(device=device)
        slots = self._slots.pop(name)
        module.load_state_dict({key: self._spill.take(slot) for key, slot in slots.items()})
        return module
