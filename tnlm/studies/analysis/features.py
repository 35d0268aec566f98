"""Describes the outputs of one matrix on data, from the moments of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tnlm.decompositions.base import matrix_shape
from tnlm.errors import CalibrationError
from tnlm.metrics.named import get_measure
from tnlm.metrics.named.inputs import CONSTANT
from tnlm.studies.analysis.spectra import Spectrum, rounding, summarize


@dataclass(frozen=True)
class FeatureRow:
    """The structure of the outputs ``y = W x`` of one matrix on data, without its bias.

    Attributes:
        name: name of the target.
        centered: whether energies are eigenvalues of the covariance ``E[y y.T] - E[y] E[y].T``, or
            of ``E[y y.T]`` itself.
        without_top: whether the largest eigenvalue, which may come from a few outliers, is left
            out.
        inputs: number of inputs x.
        spectrum: ranks of the eigenvalues. Its limit is the smallest of the matrix's outputs, its
            inputs and the independent samples. Moments are accumulated in single precision, which
            limits the numerical rank where a few directions have almost all the energy.
        top_share: fraction of the energy in the largest eigenvalue.
        note: a reason to doubt the ranks, or empty.
    """

    name: str
    centered: bool
    without_top: bool
    inputs: int
    spectrum: Spectrum
    top_share: float
    note: str = ""


def feature_rows(
    name: str, weight: Tensor, moment: Tensor, mean: Tensor, inputs: int
) -> list[FeatureRow]:
    """Describe outputs with and without their mean, and with and without their top direction.

    Args:
        name: name of the target, for the rows.
        weight: ``(out, in)``.
        moment: E[x x.T], ``(in, in)``.
        mean: E[x], ``(in,)``.
        inputs: number of inputs x behind the moments.

    Raises:
        CalibrationError: if a moment or the energy of the outputs is not finite.

    Source: "Features Are Low-Rank, but Weights Are Not!", Yu and Wu, AAAI 2023.

    Example:
        >>> moment, mean = torch.eye(4), torch.zeros(4)
        >>> rows = feature_rows("up", torch.eye(4), moment, mean, inputs=100)
        >>> [(row.centered, row.without_top, row.spectrum.k90) for row in rows]
        [(False, False, 4), (False, True, 3), (True, False, 4), (True, True, 3)]
    """
    shape, found = matrix_shape(weight), []
    # Moments are accumulated in single precision: energies below this are rounding.
    floor = 0.0
    if not bool(moment.isfinite().all() & mean.isfinite().all()):
        raise CalibrationError(f"the moments of {name}'s inputs are not finite")
    for centered in (False, True):
        energy = _energies(weight, moment, mean, centered)
        if not bool(energy.sum().isfinite()):
            raise CalibrationError(f"the energy of the outputs of {name} overflows")
        floor = floor or float(energy[0]) * rounding(shape)
        total = float(energy.sum())
        share = float(energy[0]) / total if total > 0 else 0.0
        samples = inputs - centered
        note = _note(samples, inputs, shape[0])
        for cut in (0, 1):
            limit = max(min(*shape, samples) - cut, 0)
            spectrum = summarize(energy[cut:], limit, floor)
            found.append(FeatureRow(name, centered, bool(cut), inputs, spectrum, share, note))
    return found


def _energies(weight: Tensor, moment: Tensor, mean: Tensor, centered: bool) -> Tensor:
    """Return the eigenvalues of the outputs' second moment or covariance, largest first."""
    spread = moment.diagonal() - centered * mean.square()
    if not bool((spread > CONSTANT * moment.diagonal()).any()):  # a metric would even it out
        return weight.new_zeros(min(weight.shape), dtype=torch.float64)
    statistics = {"moment": moment, "mean": mean}
    measure = get_measure("covariance" if centered else "input")
    return measure.build(statistics.__getitem__, 0.0).spectrum(weight)


def _note(samples: int, inputs: int, outputs: int) -> str:
    if samples >= outputs:
        return ""
    return f"only {inputs} inputs for {outputs} outputs, whose rank is at most {samples}"
