"""Ranks of a matrix, computed from its spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.errors import ModelError

ROWS = 4096
"""Rows converted to double precision at once."""
POINTS = 32
"""Steps of the curve of energy that a spectrum keeps."""
SLACK = 1e-9
"""Fraction of the energy allowed for rounding: 90 % of ten equal values are nine of them."""


@dataclass(frozen=True)
class Spectrum:
    """Ranks of a matrix, from its energies: squared singular values, or eigenvalues.

    Attributes:
        numerical_rank: number of energies above rounding.
        stable_rank: total energy over the largest one.
        effective_rank: exponential of the entropy of the normalized energies.
        k90: smallest number of directions that hold 90 % of the energy.
        k99: the same for 99 %.
        limit: largest rank that is possible.
        ratio90: ``k90 / limit``.
        ratio99: ``k99 / limit``.
        held: share of the energy that the first 0, 1/32, 2/32, ... of ``limit`` directions hold;
            empty if there is no energy, or in a file of an earlier version.
    """

    numerical_rank: int
    stable_rank: float
    effective_rank: float
    k90: int
    k99: int
    limit: int
    ratio90: float
    ratio99: float
    held: tuple[float, ...] = ()


def summarize(energy: Tensor, limit: int, floor: float) -> Spectrum:
    """Return the ranks behind energies; all are 0 if there is no energy.

    Args:
        energy: squared singular values or eigenvalues, in descending order, none negative.
        limit: largest rank that is possible.
        floor: energies up to this are rounding.

    Raises:
        ModelError: if an energy is not finite.

    Source: stable rank: Rudelson and Vershynin 2007; effective rank: Roy and Vetterli 2007, here
        computed from energies.

    Example:
        >>> found = summarize(torch.tensor([8.0, 1.0, 1.0, 0.0]), limit=4, floor=1e-12)
        >>> found.numerical_rank, found.stable_rank, found.k90, found.ratio90
        (3, 1.25, 2, 0.5)
    """
    energy = energy.double()
    total = float(energy.sum())
    if not torch.isfinite(energy).all() or total == float("inf"):
        raise ModelError("the energies of a matrix are not finite; its entries are too large")
    if total == 0.0:
        return Spectrum(0, 0.0, 0.0, 0, 0, limit, 0.0, 0.0)
    shares = energy / total
    k90, k99 = directions(shares, 0.9), directions(shares, 0.99)
    return Spectrum(
        int((energy > floor).sum()),
        1.0 / float(shares[0]),
        float(torch.special.entr(shares).sum().exp()),
        k90,
        k99,
        limit,
        k90 / max(limit, 1),
        k99 / max(limit, 1),
        _held(shares, limit),
    )


def _held(shares: Tensor, limit: int) -> tuple[float, ...]:
    """Return the energy of the first directions, between whole ones on a straight line."""
    sums = torch.cat([shares.new_zeros(1), shares.cumsum(0)])
    places = torch.arange(POINTS + 1, dtype=torch.float64, device=shares.device) * limit / POINTS
    places = places.clamp(max=len(shares))
    below = places.floor().long()
    above = (below + 1).clamp(max=len(shares))
    held = sums[below] + (places - below) * (sums[above] - sums[below])
    return tuple(held.clamp(max=1.0).tolist())


def directions(shares: Tensor, wanted: float) -> int:
    """Return the smallest number of directions that hold a fraction of the energy.

    Args:
        shares: energies over their sum, in descending order.
        wanted: the fraction, in (0, 1].

    Example:
        >>> directions(torch.full((10,), 0.1, dtype=torch.float64), 0.9)
        9
    """
    missing = shares.double().cumsum(0) < wanted - SLACK
    return min(int(missing.sum()) + 1, len(shares))


def smaller_gram(weight: Tensor) -> Tensor:
    """Return the Gram matrix of the shorter side in float64, without a float64 copy of the weight.

    Args:
        weight: ``(out, in)``, any float dtype.

    Returns:
        ``(n, n)`` with ``n = min(out, in)``.

    Example:
        >>> smaller_gram(torch.tensor([[3.0, 4.0]])).tolist()
        [[25.0]]
    """
    tall = weight.detach() if weight.shape[0] >= weight.shape[1] else weight.detach().T
    size = tall.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for part in tall.split(ROWS):
        rows = part.double()
        gram.addmm_(rows.T, rows)
    return gram


def rounding(shape: tuple[int, int]) -> float:
    """Return the relative singular value below which single precision only has rounding.

    It does not depend on the dtype of the weight, so that ranks can be compared.

    Example:
        >>> rounding((2, 8)) == 8 * torch.finfo(torch.float32).eps
        True
    """
    return max(shape) * float(torch.finfo(torch.float32).eps)
