"""Which shape of the factors suits a matrix: the error of a Kronecker sum for every one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tnlm.calibration.metrics import Metric
from tnlm.decompositions.base import matrix_shape
from tnlm.decompositions.kronecker import FORMAT, KroneckerSpec
from tnlm.errors import BudgetError, RankError


def kronecker_errors(
    weight: Tensor, *, keep: float = 0.5, metric: Metric | None = None
) -> dict[tuple[int, int], float]:
    """Return the relative error at one size for every shape of the inner factor.

    Each shape gets as many terms as fit; shapes of which not even one fits are left out. Draw the
    result with :func:`tnlm.studies.plot.shapes`.

    Args:
        weight: ``(out, in)``.
        keep: share of the matrix's numbers that the factors may have, in (0, 1).
        metric: how the error is measured; the Frobenius norm if not given.

    Returns:
        By ``(rows, columns)`` of the inner factor, which divide those of the matrix.

    Raises:
        BudgetError: if ``keep`` is out of range, or no shape fits.

    Source: Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.

    Example:
        >>> import torch
        >>> weight = torch.kron(torch.randn(3, 2), torch.randn(2, 2))
        >>> found = kronecker_errors(weight, keep=0.5)
        >>> min(found, key=found.get)
        (2, 2)
    """
    if not 0 < keep < 1:
        raise BudgetError(f"keep={keep}; allowed: a share of the numbers, between 0 and 1")
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
    # One by one: of several, the format measures only those that promise most.
    return {shape: FORMAT.errors(exact, how, [spec])[0] for shape, spec in chosen.items()}


def divisors(number: int) -> Iterator[int]:
    """Yield the divisors of a number, from 1 up.

    Example:
        >>> list(divisors(12))
        [1, 2, 3, 4, 6, 12]
    """
    return (d for d in range(1, number + 1) if number % d == 0)


def _largest(shape: tuple[int, int], inner: tuple[int, int], keep: float) -> KroneckerSpec | None:
    """Return the spec with the most terms that fit, None if not even one does."""
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
