"""`ArrangedLinear`: an `nn.Linear` with the memory layout that this machine reads fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.layers.machine import machine

SMALL = 2**14
"""Number of elements below which the memory layout of a weight makes no measurable difference."""


class Arranged(nn.Module):
    """A module that gives its weights the memory layout that suits this machine."""

    def arrange(self) -> None:
        """Change the memory layout of every matrix, or stack of matrices, to the best one."""
        for parameter in self.parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data = _in_order(parameter.data)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Called by .to(), .half(), .cuda(): the best layout depends on dtype and device.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.arrange()
        return self


class ArrangedLinear(Arranged, nn.Linear):
    """A linear layer that stores a tall weight in column-major order if that is read faster.

    With one token, a product reads every weight once. CPU libraries read it by rows, with one dot
    product each; for short rows, they reach only half the memory bandwidth. A column-major matrix
    is read in long runs. Shape, values and name of the weight are those of `nn.Linear`; only its
    strides change, and saved files are row-major as always.

    Example:
        >>> layer = ArrangedLinear(2, 3, bias=False)
        >>> layer.weight.shape
        torch.Size([3, 2])
    """


def arrange(model: nn.Module) -> nn.Module:
    """Give every linear layer's weight the memory layout that this machine reads fastest.

    Layers made by tnlm already have it, and update it whenever their dtype or device changes. This
    is for other layers: those that stayed dense, or a whole dense model. Values, names and saved
    files do not change. Weights shared by several modules, such as a tied head's, are left alone.
    Call it again after a change of dtype.

    Args:
        model: changed in place.

    Returns:
        The model.

    Example:
        >>> arrange(nn.Sequential(nn.Linear(2, 3)))
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
        )
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, nn.Linear) and owners[id(module.weight)] == 1:
            module.weight.data = _in_order(module.weight.data)
    return model


def arrange_made(model: nn.Module) -> None:
    """Arrange the layers made by tnlm, after their weights are filled in."""
    for module in model.modules():
        if isinstance(module, Arranged):
            module.arrange()


def linear(
    rows: int, columns: int, *, bias: bool = False, arranged: bool = True, **made: Any
) -> nn.Linear:
    """Return an uninitialised linear layer, without drawing random weights.

    Args:
        rows: size of the outputs.
        columns: size of the inputs.
        bias: whether it has a bias.
        arranged: whether it is an `ArrangedLinear`; weights to be reshaped must be row-major.
        **made: device and dtype.

    Example:
        >>> linear(3, 2, device="meta")
        ArrangedLinear(in_features=2, out_features=3, bias=False)
    """
    layer = (ArrangedLinear if arranged else nn.Linear)(1, 1, bias=bias, device="meta")
    layer.in_features, layer.out_features = columns, rows
    layer.weight = nn.Parameter(torch.empty(rows, columns, **made))
    if bias:
        layer.bias = nn.Parameter(torch.empty(rows, **made))
    return layer


def filled(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a layer with copies of a weight and a bias.

    Example:
        >>> filled(torch.ones(3, 2))
        ArrangedLinear(in_features=2, out_features=3, bias=False)
    """
    rows, columns = weight.shape
    made: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    layer = linear(rows, columns, bias=bias is not None, **made)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    arrange_made(layer)
    return layer


def _in_order(weight: Tensor) -> Tensor:
    """Return a matrix, or a stack ``(..., out, in)``, column-major if that is read faster."""
    rows, columns = weight.shape[-2:]
    if not _is_plain(weight):
        return weight
    large = rows * columns >= SMALL
    if rows <= columns or not large or not machine(weight.dtype).column_major:
        return weight.contiguous()
    return weight.mT.contiguous().mT if weight.is_contiguous() else weight


def _is_plain(weight: Tensor) -> bool:
    """Return whether a weight is a plain tensor of floats in CPU memory."""
    return type(weight) is Tensor and weight.device.type == "cpu" and weight.is_floating_point()
