"""Describes the entries and singular values of one weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.decompositions.base import matrix_shape
from tnlm.errors import ModelError
from tnlm.studies.analysis.marchenko_pastur import edge, random_directions
from tnlm.studies.analysis.spectra import ROWS, Spectrum, rounding, smaller_gram, summarize
from tnlm.tensors.linalg import energies

NEAR_ZERO = 0.01
"""An entry counts as zero up to this fraction of the matrix's root mean square."""


@dataclass(frozen=True)
class WeightRow:
    """The structure of one weight.

    Attributes:
        name: name of the target.
        shape: ``(out, in)``.
        mean: mean of its entries.
        variance: variance of its entries.
        kurtosis: fourth standardized moment of its entries, 3 for a normal distribution; None if
            all entries are equal.
        sparsity: fraction of entries with a magnitude of at most 0.01 of the root mean square;
            0.008 for a normal distribution.
        spectrum: ranks of the squared singular values.
        random90: number of directions that hold 90 % of the energy of a random matrix of this
            shape.
        above_edge: fraction of singular values that are larger than any of a random matrix of this
            shape and variance: directions that stand out from noise.
    """

    name: str
    shape: tuple[int, int]
    mean: float
    variance: float
    kurtosis: float | None
    sparsity: float
    spectrum: Spectrum
    random90: int
    above_edge: float


def weight_row(name: str, weight: Tensor) -> WeightRow:
    """Describe a weight by the moments of its entries and by its singular values.

    Args:
        name: name of the target, for the row and for errors.
        weight: ``(out, in)``, any float dtype; converted to double precision in parts.

    Raises:
        ModelError: if the weight or its energy is not finite.

    Example:
        >>> row = weight_row("up", torch.eye(10))
        >>> row.spectrum.k90, row.random90, row.sparsity
        (9, 6, 0.9)
    """
    shape = matrix_shape(weight)
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        raise ModelError(f"{name} has {count} NaN or infinite weights; nothing was analyzed")
    mean, variance, kurtosis, sparsity = _moments(weight)
    try:
        energy = energies(smaller_gram(weight))
        floor = float(energy[0]) * rounding(shape) ** 2
        spectrum = summarize(energy, min(shape), floor)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    noise = max(edge(shape, variance) ** 2, floor)
    above = int((energy > noise).sum()) / len(energy)
    return WeightRow(
        name,
        shape,
        mean,
        variance,
        kurtosis,
        sparsity,
        spectrum,
        random_directions(shape),
        above,
    )


def _moments(weight: Tensor) -> tuple[float, float, float | None, float]:
    """Return mean, variance, kurtosis and sparsity, in two passes."""
    parts, count = weight.detach().split(ROWS), weight.numel()
    total = sum(float(part.double().sum()) for part in parts)
    square = sum(float(part.double().square().sum()) for part in parts) / count
    mean, small = total / count, NEAR_ZERO * square**0.5
    second = fourth = 0.0
    zeros = 0
    for part in parts:
        centered = part.double()
        zeros += int((centered.abs() <= small).sum())
        centered = (centered - mean).square_()
        second += float(centered.sum()) / count
        fourth += float(centered.square_().sum()) / count
    # If all entries are equal, rounding leaves about 1e-32 of the mean square.
    varies = second > 1e-24 * square and second**2 > 0
    return mean, second, fourth / second**2 if varies else None, zeros / count
