"""`ArrangedLinear`: an `nn.Linear` whose weight lies in memory as the machine reads it fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.layers.machine import machine

SMALL = 2**14
"""Numbers below which a weight's order in memory makes no difference that can be measured."""


class Arranged(nn.Module):
    """A module that puts its weights into the order in memory that suits this machine."""

    def arrange(self) -> None:
        """Put every matrix, or stack of matrices, into the order that suits it."""
        for parameter in self.parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.data = _in_order(parameter.data)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Called by .to(), .half(), .cuda(): another dtype or device may want another order.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.arrange()
        return self


class ArrangedLinear(Arranged, nn.Linear):
    """A linear map that stores a tall weight by columns where that is read faster.

    At one token a product reads every weight once. CPU libraries read it along its rows, one dot
    product each; when the rows are short they reach half the speed of memory. The same matrix by
    columns is read in long runs. Shape, values and name of the weight stay those of `nn.Linear`:
    only its strides change, and a saved file holds it by rows as always.

    Example:
        >>> layer = ArrangedLinear(2, 3, bias=False)
        >>> layer.weight.shape
        torch.Size([3, 2])
    """


def arrange(model: nn.Module) -> nn.Module:
    """Let every linear layer's weight lie in memory as this machine reads it fastest.

    Layers that tnlm made are arranged already, and again whenever they change dtype or device. This
    is for the others: those that stayed dense, or a whole dense model. Values, names and saved
    files are as before. Weights that several modules share, as a head's with the embedding, are
    left alone. Call it again after a change of dtype.

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
    """Arrange the layers that tnlm made, after their weights were filled in."""
    for module in model.modules():
        if isinstance(module, Arranged):
            module.arrange()


def linear(
    rows: int, columns: int, *, bias: bool = False, arranged: bool = True, **made: Any
) -> nn.Linear:
    """Return an (uninitialised) layer; drawing random weights would be wasted.

    Args:
        rows: size of its outputs.
        columns: size of its inputs.
        bias: whether it has one.
        arranged: whether it is an `ArrangedLinear`; a weight that is reshaped must lie by rows.
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
    """Return a layer that holds copies of a weight and a bias.

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
    """Return a matrix, or a stack ``(..., out, in)``, by columns if that is read faster."""
    rows, columns = weight.shape[-2:]
    if not _is_plain(weight):
        return weight
    large = rows * columns >= SMALL
    if rows <= columns or not large or not machine(weight.dtype).column_major:
        return weight.contiguous()
    return weight.mT.contiguous().mT if weight.is_contiguous() else weight


def _is_plain(weight: Tensor) -> bool:
    """Tell whether a weight is numbers in this machine's memory, not quantized nor elsewhere."""
    return type(weight) is Tensor and weight.device.type == "cpu" and weight.is_floating_point()
