"""Stubs to run a layer without its matrices, on known random values."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""
Linear = nn.Linear | Conv1D
"""Classes of modules that multiply their input by a matrix."""
Around = Callable[[], dict[nn.Module, "Bypass"]]
"""Makes stubs of the modules beside some matrices."""
SIZED = ("weight", "bias", "in_features", "out_features", "nx", "nf")
"""Attributes of linear modules that other code reads."""


def random_values(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Return random values that depend only on the seed, ``(rows, columns)``."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return made.to(like.dtype) if like.is_meta else made.to(like)


def widths(module: Any) -> tuple[int, int]:
    """Return the number of outputs and of inputs of a linear module.

    Example:
        >>> widths(Conv1D(24, 8)), widths(nn.Linear(8, 24))
        ((24, 8), (24, 8))
    """
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


class Stub(nn.Module):
    """A stub of a matrix, which returns random values and records its inputs.

    Attributes:
        columns: number of outputs.
        given: the inputs of all calls.
        change: applied to the values ``(tokens, columns)`` before they are returned.
    """

    def __init__(self, old: Any, seed: int) -> None:
        """Copy the attributes of a linear module."""
        super().__init__()
        for name in SIZED:
            if hasattr(old, name):
                object.__setattr__(self, name, getattr(old, name))
        self.columns, self._seed = widths(old)[0], seed
        self._values: dict[int, Tensor] = {}
        self.given: list[Tensor] = []
        self.change: Callable[[Tensor], Tensor] = lambda values: values

    def forward(self, x: Tensor) -> Tensor:
        """Return values that depend only on the number of tokens."""
        self.given.append(x)
        tokens: int = x.shape[:-1].numel()
        like: Any = self.weight
        if tokens not in self._values:
            self._values[tokens] = random_values(tokens, self.columns, self._seed, like)
        return self.change(self._values[tokens].clone()).reshape(*x.shape[:-1], -1)


class Bypass(nn.Module):
    """A stub of a sibling module, such as attention, which returns its first input.

    Attributes:
        given: the first inputs of all calls.
    """

    def __init__(self, others: int | None) -> None:
        """Set how many Nones follow the input in a tuple; None to return the input alone."""
        super().__init__()
        self._others = others
        self.given: list[Tensor] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor of the arguments."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.given.append(first)
        return first if self._others is None else (first, *[None] * self._others)


def copied(
    module: nn.Module, others: Mapping[nn.Module, nn.Module], sizes: nn.Module | None = None
) -> nn.Module:
    """Copy modules but not their parameters, in eval mode and without hooks.

    Args:
        module: the module to copy; left unchanged.
        others: replacements of some modules in the copy.
        sizes: a module of the same structure, from which integer attributes are copied.
    """
    if module in others:
        return others[module]
    made = copy.copy(module)
    remembered = {} if sizes is None else vars(sizes)
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            object.__setattr__(made, name, OrderedDict())
        elif type(value) is int and type(remembered.get(name)) is int:
            object.__setattr__(made, name, remembered[name])
    made.__dict__["training"] = False
    made.__dict__["_parameters"] = {
        name: _present(parameter) for name, parameter in module._parameters.items()
    }
    made.__dict__["_buffers"] = {
        name: None if buffer is None else _present(buffer, clone=True)
        for name, buffer in module._buffers.items()
    }
    made.__dict__["_modules"] = {
        name: None if child is None else copied(child, others, _child(sizes, name))
        for name, child in module._modules.items()
    }
    return made


def _present(tensor: Any, clone: bool = False) -> Any:
    """Return a tensor, or ones for a tensor on the meta device."""
    if tensor is None or not tensor.is_meta:
        return tensor.clone() if clone else tensor
    ones = torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(ones, False) if isinstance(tensor, nn.Parameter) else ones


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    return None if module is None else module._modules.get(name)


def calls(layer: nn.Module, tokens: int, width: int, like: Tensor) -> Iterator[Call]:
    """Yield ways to call a layer with random hidden states."""
    states = random_values(tokens, width, 1, like).unsqueeze(0)
    wanted = [
        parameter.name
        for parameter in inspect.signature(layer.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    yield (states,), dict.fromkeys(wanted[1:])
    if wanted[1:]:  # such as the residual
        yield (states,), dict.fromkeys(wanted[1:], states)


def detours(layer: nn.Module, matrices: Sequence[nn.Module]) -> Iterator[Around]:
    """Yield ways to replace the modules beside some matrices, such as attention; first, none.

    These modules are the children of a layer with other matrices.
    """
    yield dict
    beside = [
        child
        for child in layer.children()
        if any(isinstance(module, Linear) for module in child.modules())
        and not any(module in matrices for module in child.modules())
    ]
    if beside:
        for others in (1, None, 2):
            yield partial(_around, beside, others)


def _around(beside: Sequence[nn.Module], others: int | None) -> dict[nn.Module, Bypass]:
    return {child: Bypass(others) for child in beside}
