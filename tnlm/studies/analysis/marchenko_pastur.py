"""The spectrum of a random matrix, from the Marchenko-Pastur law: what to expect by chance."""

from __future__ import annotations

import math

from scipy.integrate import quad
from scipy.optimize import brentq


def random_directions(shape: tuple[int, int], wanted: float = 0.9) -> int:
    """Return how many directions hold a fraction of the energy of a random matrix.

    The entries are independent, with mean 0 and equal variances. Let g be the shorter side over the
    longer one, and write an eigenvalue of the Gram matrix as ``1 + g + 2 sqrt(g) cos(t)``. Then
    energy has the density ``2 / pi sin(t)^2`` in t for every g, and the density of eigenvalues is
    that over the eigenvalue.

    Args:
        shape: ``(out, in)``.
        wanted: the fraction of the energy, in (0, 1).

    Source: Marchenko and Pastur, 1967.

    Example:
        >>> random_directions((1000, 1000)), random_directions((100, 10_000))
        (510, 89)
    """
    short, long = sorted(shape)
    ratio = short / long
    last = brentq(lambda t: (t - math.sin(t) * math.cos(t)) / math.pi - wanted, 0.0, math.pi)

    def count(t: float) -> float:
        return math.sin(t) ** 2 / (1.0 + ratio + 2.0 * math.sqrt(ratio) * math.cos(t))

    share: float = 2.0 / math.pi * quad(count, 0.0, last)[0]
    return min(math.ceil(short * share), short)


def edge(shape: tuple[int, int], variance: float) -> float:
    """Return the largest singular value of a large random matrix.

    Args:
        shape: ``(out, in)``.
        variance: variance of its entries.

    Example:
        >>> edge((9, 16), variance=4.0)
        14.0
    """
    return math.sqrt(variance) * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
