"""kronecker_errors: which shape of Kronecker factors suits a matrix."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tnlm.decompositions.base import matrix_shape
from tnlm.decompositions.kronecker import FORMAT, KroneckerSpec
from tnlm.errors import BudgetError, RankError
from tnlm.metrics.metric import Metric


def kronecker_errors(
    weight: Tensor, *, keep: float = 0.5, metric: Metric | None = None
) -> dict[tuple[int, int], float]:
    """Return the relative error of a Kronecker sum for every shape of its inner factor.

    Each shape gets as many terms as the size allows; shapes that do not even allow one are left
    out. :func:`tnlm.plot.shapes` draws the result.

    Args:
        weight: ``(out, in)``.
        keep: fraction of the matrix's parameters that the factors may have, in (0, 1).
        metric: norm of the error; the Frobenius norm if None.

    Returns:
        Errors by ``(rows, columns)`` of the inner factor, which divide those of the matrix.

    Raises:
        BudgetError: if ``keep`` is out of range, or no shape is small enough.

    Source: Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.

    Example:
        >>> import torch
        >>> weight = torch.kron(torch.randn(3, 2), torch.randn(2, 2))
        >>> found = kronecker_errors(weight, keep=0.5)
        >>> min(found, key=found.get)
        (2, 2)
    """
    if not 0 < keep < 1:
        raise BudgetError(f"keep={keep}; allowed: a fraction of the parameters, between 0 and 1")
    rows, columns = matrix_shape(weight)
    chosen = {
        (p, q): spec
        for p in divisors(rows)
        for q in divisors(columns)
        for spec in [_largest((rows, columns), (p, q), keep)]
        if spec is not None
    }
    if not chosen:
        raise BudgetError(f"keep={keep}: no Kronecker product of a {rows}x{columns} matrix fits")
    exact, how = weight.detach().double(), metric or Metric()
    # One at a time: given several, the format only measures the most promising ones.
    return {shape: FORMAT.errors(exact, how, [spec])[0] for shape, spec in chosen.items()}


def divisors(number: int) -> Iterator[int]:
    """Yield the divisors of a number in ascending order.

    Example:
        >>> list(divisors(12))
        [1, 2, 3, 4, 6, 12]
    """
    return (d for d in range(1, number + 1) if number % d == 0)


def _largest(shape: tuple[int, int], inner: tuple[int, int], keep: float) -> KroneckerSpec | None:
    """Return the spec with as many terms as the size allows; None if that is not even one."""
    (rows, columns), (p, q) = shape, inner
    best = None
    for terms in range(1, min(p * q, rows * columns // (p * q)) + 1):
        spec = KroneckerSpec(terms, (rows // p, p), (columns // q, q))
        try:
            fits = FORMAT.network(shape, spec).params <= keep * rows * columns
        except RankError:
            break
        if not fits:
            break
        best = spec
    return best
