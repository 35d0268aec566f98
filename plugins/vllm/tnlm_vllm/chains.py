"""Runs chains of products; torch alone is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tnlm_vllm.layout import CODES, ORDER, SCALES, Layer, Step

Product = Callable[[Tensor], nn.Module]
"""Makes the module that multiplies ``(rows, in)`` by a matrix ``(out, in)``."""
KERNEL_TOKENS, KERNEL_COLUMNS = 16, 16
"""torch's kernel for int8 is meant for few tokens, and reads so many columns at once."""
ALIGNED = 64
"""Bytes to which the kernel's operands are aligned: it crashes on others."""


class Int8Product(nn.Module):
    """A product with int8 codes that have a scale for every row.

    Args:
        codes: ``(out, in)``, int8.
        scales: ``(out,)``.

    Example:
        >>> codes = torch.tensor([[2, -4]], dtype=torch.int8)
        >>> Int8Product(codes, torch.tensor([0.5]))(torch.tensor([[1.0, 1.0]]))
        tensor([[-1.]])
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        """Keep the codes and scales."""
        super().__init__()
        self.codes = nn.Parameter(_aligned(codes), requires_grad=False)
        self.scales = nn.Parameter(_aligned(scales), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``(rows, in)``."""
        fast = (
            x.dtype is torch.bfloat16
            and x.device.type == "cpu"
            and x.shape[1] % KERNEL_COLUMNS == 0
            and not torch.compiler.is_compiling()  # whose graph is kept for every length
        )
        if fast and 0 < len(x) <= KERNEL_TOKENS:
            product: Tensor = torch.ops.aten._weight_int8pack_mm(
                _aligned(x), self.codes, self.scales
            )
            return product
        if x.dtype is torch.float16:  # in which sums of products with codes overflow
            return x @ (self.codes.to(x.dtype) * self.scales[:, None]).T
        return x @ self.codes.to(x.dtype).T * self.scales


class Blocks(nn.Module):
    """A product of every block of the activation with a matrix of its own.

    Args:
        matrices: ``(blocks, out, in)``.

    Example:
        >>> Blocks(torch.ones(2, 1, 3))(torch.ones(5, 2, 3)).shape
        torch.Size([5, 2, 1])
    """

    def __init__(self, matrices: Tensor) -> None:
        """Keep the matrices."""
        super().__init__()
        self.matrices = nn.Parameter(matrices, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``(rows, blocks, in)``."""
        return torch.bmm(x.transpose(0, 1), self.matrices.transpose(1, 2)).transpose(0, 1)


class Chain(nn.Module):
    """A layer's products, one after the other.

    Args:
        layer: the description.
        tensors: its tensors by name.
        product: makes the product with a matrix.
        begun: whether the first product is made elsewhere.

    Example:
        >>> from tnlm_vllm.layout import dense
        >>> def product(weight):
        ...     made = nn.Linear(*weight.shape[::-1], bias=False)
        ...     made.weight = nn.Parameter(weight)
        ...     return made
        >>> made = Chain(dense((1, 2)), {"weight": torch.tensor([[1.0, 2.0]])}, product)
        >>> made(torch.tensor([[3.0, 4.0]])).tolist()
        [[11.0]]
    """

    def __init__(
        self, layer: Layer, tensors: Mapping[str, Tensor], product: Product, *, begun: bool = False
    ) -> None:
        """Make the products."""
        super().__init__()
        self.layer = layer
        self.steps = layer.steps[1:] if begun else layer.steps
        self.start = layer.steps[0].after if begun else layer.modes
        order = tensors.get(ORDER)
        self.order = None if order is None else nn.Parameter(order, requires_grad=False)
        self.products = nn.ModuleList(_made(step, tensors, product) for step in self.steps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the chain to ``(tokens, in)``."""
        h, sizes = x, self.start
        for step, product in zip(self.steps, self.products, strict=True):
            if step.permute is not None:
                h = _permuted(h.reshape(-1, *sizes), step.permute)
            if step.blocks > 1:
                h = product(h.reshape(-1, step.blocks, step.width))
            else:
                h = self._multiplied(step, product, h.reshape(-1, step.width))
            sizes = step.after
        if self.layer.permute is not None:
            h = _permuted(h.reshape(-1, *sizes), self.layer.permute)
        return h.reshape(-1, self.layer.shape[0])

    def _multiplied(self, step: Step, product: nn.Module, h: Tensor) -> Tensor:
        """Multiply ``(rows, in)``; what the factor's identity block passes on is only moved."""
        if step.identity is None or self.order is None:
            made: Tensor = product(h)
            return made
        if step.identity == "out":
            return torch.cat((h, product(h)), -1).index_select(-1, self.order)
        passed, rest = h.index_select(-1, self.order).split((step.rows, step.columns), -1)
        added: Tensor = product(rest) + passed
        return added


class Merged(nn.Module):
    """Several layers of one input side by side, whose first products are one where they can be.

    Args:
        layers: the descriptions, in the order of their outputs.
        tensors: those of each layer.
        product: makes the product with a matrix.
    """

    def __init__(
        self, layers: Sequence[Layer], tensors: Sequence[Mapping[str, Tensor]], product: Product
    ) -> None:
        """Make the products."""
        super().__init__()
        firsts = [layer.steps[0] for layer in layers]
        begun = [len(layers) > 1 and _can_join(step) for step in firsts]
        joined = [
            held[step.tensor] for held, step, b in zip(tensors, firsts, begun, strict=True) if b
        ]
        self.sizes = [len(matrix) for matrix in joined]
        self.begun = begun
        self.first = product(torch.cat(joined)) if joined else None
        self.chains = nn.ModuleList(
            Chain(layer, held, product, begun=b)
            for layer, held, b in zip(layers, tensors, begun, strict=True)
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Apply all layers to ``(..., in)``, and add a bias to their joined outputs."""
        flat = x.reshape(-1, x.shape[-1])
        ready = iter(() if self.first is None else self.first(flat).split(self.sizes, -1))
        outputs = [
            chain(next(ready) if begun else flat)
            for chain, begun in zip(self.chains, self.begun, strict=True)
        ]
        made = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        made = made if bias is None else made + bias
        return made.reshape(*x.shape[:-1], made.shape[-1])


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor as torch's kernel reads it: in one piece, from where it may start."""
    made = tensor.contiguous()
    return made.clone() if made.data_ptr() % ALIGNED else made


def _can_join(step: Step) -> bool:
    return step.is_flat and not step.int8 and step.identity is None


def _made(step: Step, tensors: Mapping[str, Tensor], product: Product) -> nn.Module:
    if step.int8:
        return Int8Product(tensors[step.tensor + CODES], tensors[step.tensor + SCALES])
    matrix = tensors[step.tensor]
    return product(matrix) if step.blocks == 1 else Blocks(matrix.unflatten(0, (step.blocks, -1)))


def _permuted(h: Tensor, order: Sequence[int]) -> Tensor:
    return h.permute(0, *(axis + 1 for axis in order))
