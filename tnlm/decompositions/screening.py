"""Error curves from the spectra of the whitened matrix, of which one fit is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from tnlm.decompositions.base import Ceiling, Format, matrix_shape
from tnlm.decompositions.whitening import is_plain
from tnlm.metrics.metric import Metric
from tnlm.utils.ties import EXACT, least

S = TypeVar("S")
KEEPS = tuple(percent / 100 for percent in range(10, 100, 5))
"""Fractions of a matrix's parameters at which a curve from spectra is sampled."""
TRIED = 0.8
"""Where on a curve the trial fit is made, as a fraction of its length."""

Guess = Callable[[Tensor, Sequence[S]], Sequence[float]]
"""Returns the relative error of each spec for a matrix under the Frobenius norm, from spectra."""


def screened(
    structure: Format[S],
    weight: Tensor,
    metric: Metric,
    options: Mapping[str, Any],
    macs: float,
    guess: Guess[S],
    measure: Callable[[S], float] | None = None,
) -> list[tuple[S, float]]:
    """Return specs of increasing size with predicted relative errors, as choices for allocation.

    The matrix is whitened once. Its spectra predict the error of every spec exactly as far as the
    metric is separable over the modes. All predictions are then scaled by one factor, the measured
    over the predicted error of one spec.

    Args:
        structure: the format.
        weight: ``(out, in)``.
        metric: how the error is measured.
        options: values of some fields of the spec.
        macs: the most multiply-adds per token.
        guess: predicts errors from spectra.
        measure: returns the relative error of a spec after a trial fit; by default the format's.
    """
    shape, found = matrix_shape(weight), {}
    ceilings = [Ceiling(keep * weight.numel(), macs) for keep in KEEPS]
    choices = [structure.candidates(shape, options, ceiling) for ceiling in ceilings]
    specs = list(dict.fromkeys(spec for each in choices for spec in each))
    errors = dict(zip(specs, guess(metric.start().whiten(weight), specs), strict=True))
    for each in filter(None, choices):
        best = each[least([errors[spec] for spec in each], EXACT)]
        found[best] = errors[best]
    if is_plain(metric):
        return list(found.items())
    scale = trial(measure or (lambda spec: structure.errors(weight, metric, [spec])[0]), found)
    return [(spec, min(scale * error, 1.0)) for spec, error in found.items()]


def trial(measure: Callable[[S], float], predicted: Mapping[S, float]) -> float:
    """Return the measured over the predicted error of the spec at about ``TRIED``.

    Args:
        measure: returns the relative error of a spec, from a fit.
        predicted: relative errors by spec, in order of size.
    """
    tried = list(predicted)[: round(TRIED * len(predicted))][-1:]
    if not tried or predicted[tried[0]] <= EXACT:
        return 1.0
    return measure(tried[0]) / predicted[tried[0]]
