"""Products with packed codes: torch's own kernels where there is one, else through the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from tnlm.precision.grid import Precision

TOKENS = 16
"""Tokens up to which the kernel is used: it is meant for decoding, not for long inputs."""
COLUMNS = 16
"""Columns that the kernel reads at once; other than a multiple would be read out of bounds."""

ALIGNED = 64
"""Bytes to which the kernel's operands are aligned: it crashes on others."""


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor, or a copy where its memory does not start as the kernel needs it.

    Tensors that are mapped from a file start anywhere.
    """
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor


def int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Return ``x @ (scales * codes).T`` by torch's kernel for int8 weights.

    Args:
        x: ``(..., in)``, bfloat16; its columns a multiple of 16.
        codes: ``(out, in)``, int8, `aligned`.
        scales: ``(out, 1)``, bfloat16.
    """
    flat = aligned(x.reshape(-1, x.shape[-1]).contiguous())
    product: Tensor = torch.ops.aten._weight_int8pack_mm(flat, codes, scales.squeeze(1))
    return product.reshape(*x.shape[:-1], -1)


def has_kernel(x: Tensor, precision: Precision) -> bool:
    """Return whether a product of ``x`` with int8 codes is faster packed than through the weight.

    torch has a fast kernel for bfloat16 on the CPU; for float32 its own is slower than
    dequantising. It has no backward pass. A compiled graph keeps one path for every length.

    Example:
        >>> x = torch.zeros(1, 32, dtype=torch.bfloat16)
        >>> has_kernel(x, Precision(8, None)), has_kernel(x.float(), Precision(8, None))
        (True, False)
    """
    return (
        precision.bits == 8
        and precision.group is None
        and precision.symmetric
        and x.dtype is torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[-1] % COLUMNS == 0
        and 0 < x.numel() <= TOKENS * x.shape[-1]
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
    )
