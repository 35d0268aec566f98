"""What tests of rotations of the residual stream share."""

from __future__ import annotations

import torch

from tests import mixtures

IDS = torch.arange(24).reshape(2, 12) + 3
SIZES = {**mixtures.SIZES, "tie_word_embeddings": False}


def turn_of(size=32, seed=0):
    """Return a random orthogonal matrix, ``(size, size)``, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
