"""The metric from inputs and output gradients (K-FAC)."""

from __future__ import annotations

from tnlm.metrics.measure import GRADIENTS, INPUTS, Gathered, Measure
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

GRADIENT_SHRINK = 0.3
"""Fraction of an output-gradient moment replaced by its mean diagonal (as in LEMS)."""


def _build(of: Gathered, damping: float) -> Metric:
    return Metric(Side(of("gradient"), GRADIENT_SHRINK), Side(of("moment"), damping))


def effect_of_both(of: Gathered) -> float:
    """Return 1, since the metric already is the effect on the loss; 0 if the data shows none."""
    gradient = float(of("gradient").diagonal().mean())
    return float(gradient * float(of("moment").diagonal().mean()) > 0)


MEASURES = (
    Measure(
        "two-sided",
        "error of the output weighted by its effect on the loss (K-FAC)",
        build=_build,
        importance=effect_of_both,
        needs=frozenset({INPUTS, GRADIENTS}),
        gathering={GRADIENTS: {"moment": "full"}},
        damping=5e-2,
    ),
)
