"""A LoRA of its own for every matrix of a fused module, as blocks of one LoRA of the module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from tnlm.calibration.lora_sums import Parts
from tnlm.layers.adapters import Adapter, Lora


def start_apart(adapters: Mapping[str, Adapter], parts: Mapping[str, Parts], seed: int) -> None:
    """Set A to zero and B orthonormal, with one block per matrix, outside of which B stays zero.

    Args:
        adapters: the LoRA of every module; its rank is the same for each matrix of a module.
        parts: rows of each matrix in each module.
        seed: draws B.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, adapter in adapters.items():
        B = torch.zeros(adapter.B.shape, dtype=torch.float64)
        rank = B.shape[1] // len(parts[name])
        for part, rows in enumerate(parts[name]):
            drawn = torch.randn(len(B[rows]), rank, generator=generator, dtype=torch.float64)
            B[rows, part * rank : (part + 1) * rank] = torch.linalg.qr(drawn)[0]
        adapter.fill(Lora(torch.zeros_like(adapter.A), B, adapter.scaling))
        if len(parts[name]) > 1:
            adapter.B.register_hook(partial(torch.mul, (B != 0).to(adapter.B)))


def own_factors(lora: Lora, parts: Parts) -> dict[str, Tensor]:
    """Return the factors of every matrix in a module, whose product is added to its weight.

    Args:
        lora: of the module; with several matrices, B is zero outside their blocks.
        parts: rows of each matrix.

    Returns:
        ``lora_A`` ``(r, in)``, or ``(parts, r, in)`` for several matrices, and ``lora_B``
        ``(out, r)``, float32 on the CPU.

    Example:
        >>> A, B = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> found = own_factors(Lora(A, B), [slice(0, 1), slice(1, 2)])
        >>> found["lora_A"].tolist(), found["lora_B"].tolist()
        ([[[1.0]], [[2.0]]], [[3.0], [4.0]])
    """
    A, B = lora.A.detach().float().cpu(), lora.scaling * lora.B.detach().float().cpu()
    if len(parts) == 1:
        return {"lora_A": A, "lora_B": B}
    own = torch.empty(len(B), B.shape[1] // len(parts))
    for rows, block in zip(parts, B.chunk(len(parts), 1), strict=True):
        own[rows] = block[rows]
    return {"lora_A": torch.stack(A.chunk(len(parts))), "lora_B": own}
