"""Packs codes of a few bits into bytes: eight codes fill as many bytes as a code has bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes ``(rows, columns)``, uint8 below ``2**bits``, as bytes ``(rows, packed)``.

    Code j of a block of eight takes the bits from ``j * bits`` on, lowest first.

    Example:
        >>> pack(torch.tensor([[1, 2, 3, 0, 0, 0, 0, 0]], dtype=torch.uint8), 4).tolist()
        [[33, 3, 0, 0]]
    """
    if bits == 8:
        return codes
    blocks = F.pad(codes, (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8)).int()
    packed: Tensor = blocks.new_zeros(*blocks.shape[:2], bits + 1)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        spread = blocks[..., place] << shift
        packed[..., byte] |= spread & 255
        packed[..., byte + 1] |= spread >> 8
    return packed[..., :bits].flatten(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the codes ``(rows, columns)`` that were packed.

    Example:
        >>> unpack(torch.tensor([[33, 3, 0, 0]], dtype=torch.uint8), 4, 3).tolist()
        [[1, 2, 3]]
    """
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]
    blocks = packed.unflatten(1, (-1, bits))
    mask = (1 << bits) - 1
    codes = []
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = blocks[..., byte] >> shift
        if shift + bits > 8:
            code = code | blocks[..., byte + 1] << (8 - shift)
        codes.append(code & mask)
    return torch.stack(codes, dim=-1).flatten(1)[:, :columns]
