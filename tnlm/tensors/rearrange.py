"""The rearrangement under which a Kronecker product becomes a rank-one matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

Split = tuple[int, int]


def rearrange(weight: Tensor, out_split: Sequence[int], in_split: Sequence[int]) -> Tensor:
    """Rearrange W into R(W), whose rows are the flattened blocks of W.

    Args:
        weight: ``(o0*o1, i0*i1)``.
        out_split: ``(o0, o1)``, outer size first.
        in_split: ``(i0, i1)``.

    Returns:
        ``(o0*i0, o1*i1)``, such that R(kron(A, B)) = vec(A) vec(B).T for A of shape ``(o0, i0)``.

    Source: Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.

    Example:
        >>> import torch
        >>> a, b = torch.randn(2, 3), torch.randn(4, 5)
        >>> rows = rearrange(torch.kron(a, b), (2, 4), (3, 5))
        >>> bool(torch.allclose(rows, torch.outer(a.flatten(), b.flatten())))
        True
    """
    (o0, o1), (i0, i1) = out_split, in_split
    return weight.reshape(o0, o1, i0, i1).transpose(1, 2).reshape(o0 * i0, o1 * i1)


def sample(weight: Tensor, out_split: Split, in_split: Split, keep: int) -> Tensor:
    """Return R(W) restricted to about ``keep`` evenly spaced rows or columns of its longer side."""
    (o0, o1), (i0, i1) = out_split, in_split
    blocks = weight.reshape(o0, o1, i0, i1)
    tall = o0 * i0 >= o1 * i1
    first, second = (o0, i0) if tall else (o1, i1)
    thin = max(first * second // keep, 1)
    step = min(thin, first)
    steps = step, max(thin // step, 1)
    chosen = blocks[:: steps[0], :, :: steps[1]] if tall else blocks[:, :: steps[0], :, :: steps[1]]
    rows, _, columns, _ = chosen.shape
    return chosen.transpose(1, 2).reshape(rows * columns, -1)


def divisor_pairs(size: int) -> Iterator[Split]:
    """Yield every pair (outer, inner) of whole numbers whose product is ``size``.

    Example:
        >>> list(divisor_pairs(6))
        [(1, 6), (2, 3), (3, 2), (6, 1)]
    """
    for outer in range(1, size + 1):
        if size % outer == 0:
            yield outer, size // outer
