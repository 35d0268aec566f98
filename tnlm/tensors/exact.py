"""Rounds what is summed over batches to a grid, on which float64 sums are exact.

So the sums do not depend on the order of the batches, nor on how they are shared out to processes.
The grid of a batch is its own: 26 bits below a bound on its values, finer than float32 products
are. Sums of up to 1,000 batches are exact if the bounds differ by a factor of less than 2^15;
beyond that their last bits may depend on the order.

Source: reproducible summation by rounding to a grid first, Demmel and Nguyen 2013.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 26
"""Bits that are kept below the bound."""
_STEP = 1.5 * 2.0 ** (52 - BITS)
"""Times the bound, a float64 number whose last bit is the grid: adding it rounds."""


def rounded_products(products: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return inner products of vectors on their grid, float64.

    Args:
        products: ``(n, m)``.
        left: bounds on the norms of the n vectors, from :func:`power_of_two`.
        right: bounds on those of the m vectors.

    Example:
        >>> rows = torch.tensor([[1.0, 1e-3], [1.0, 0.0]])
        >>> bounds = power_of_two(rows.norm(dim=0))
        >>> rounded_products(rows.T @ rows, bounds, bounds)[0, 0]
        tensor(2., dtype=torch.float64)
    """
    wide, left, right = products.double(), left.double(), right.double()
    return wide.addr_(left, right, alpha=_STEP).addr_(left, right, alpha=-_STEP)


def rounded(values: Tensor, bound: Tensor) -> Tensor:
    """Return float64 values on the grid of a bound on their magnitude.

    Example:
        >>> rounded(torch.tensor([1.0 + 2.0**-40], dtype=torch.float64), torch.tensor([1.0]))
        tensor([1.], dtype=torch.float64)
    """
    large = power_of_two(bound).double() * _STEP
    return (values + large) - large


def power_of_two(bound: Tensor) -> Tensor:
    """Return the least powers of two above some values; 0 for 0.

    Example:
        >>> power_of_two(torch.tensor([3.0, 0.0]))
        tensor([4., 0.])
    """
    mantissa, exponent = torch.frexp(bound)
    return torch.ldexp(mantissa.sign(), exponent)
