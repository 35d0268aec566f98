"""Metrics from the inputs of a matrix."""

from __future__ import annotations

from functools import partial

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


inputs = partial(Measure, importance=effect("moment"), needs=frozenset({INPUTS}))

MEASURES = (
    inputs(
        "diagonal",
        "columns weighted by the mean magnitude of their input (ASVD)",
        lambda of, damping: Metric(inputs=Side(of("magnitude"), damping)),
        importance=effect("magnitude"),  # not their squares
    ),
    inputs(
        "input",
        "error of the output on data (whitening)",
        lambda of, damping: InputMoment(of("moment"), damping),
    ),
    inputs(
        "covariance",
        "error of the output about its mean; the mean error is ignored (LLM-ROM's code)",
        _covariance,
    ),
    inputs(
        "centered",
        "error of the output about its mean; the mean error goes into a bias (AFM)",
        _centered,
        adds_bias=True,
    ),
)
