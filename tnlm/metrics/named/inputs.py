"""Metrics from the inputs of a matrix."""

from __future__ import annotations

import torch

from tnlm.metrics.measure import INPUTS, Gathered, Measure, effect
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.metrics.sides import Side

CONSTANT = 1e-12
"""An input is constant if its variance is at most this fraction of its mean square."""


def _covariance(of: Gathered, damping: float) -> Metric:
    mean, moment = of("mean").double(), of("moment").double()
    centered = moment - torch.outer(mean, mean)
    # The variance of a constant input is only rounding.
    constant = centered.diagonal() <= CONSTANT * moment.diagonal()
    centered[constant] = 0.0
    centered[:, constant] = 0.0
    return Metric(inputs=Side(centered, damping))


def _centered(of: Gathered, damping: float) -> Metric:
    return Metric(inputs=_covariance(of, damping).inputs, mean=of("mean"))


MEASURES = (
    Measure(
        "diagonal",
        "columns weighted by the mean magnitude of their input (ASVD)",
        build=lambda of, damping: Metric(inputs=Side(of("magnitude"), damping)),
        importance=effect("magnitude"),  # not their squares
        needs=frozenset({INPUTS}),
    ),
    Measure(
        "input",
        "error of the output on data (whitening)",
        build=lambda of, damping: InputMoment(of("moment"), damping),
        importance=effect("moment"),
        needs=frozenset({INPUTS}),
    ),
    Measure(
        "covariance",
        "error of the output about its mean; the mean error is ignored (LLM-ROM's code)",
        build=_covariance,
        importance=effect("moment"),
        needs=frozenset({INPUTS}),
    ),
    Measure(
        "centered",
        "error of the output about its mean; the mean error goes into a bias (AFM)",
        build=_centered,
        importance=effect("moment"),
        needs=frozenset({INPUTS}),
        adds_bias=True,
    ),
)
