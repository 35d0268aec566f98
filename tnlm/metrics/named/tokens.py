"""The metric of embeddings: rows weighted by how often their token occurs."""

from __future__ import annotations

from tnlm.metrics.measure import TOKENS, Gathered, Measure
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

UNSEEN = 0.1
"""Fraction of the frequencies that is spread over all tokens, since other texts have others."""


def _build(of: Gathered, damping: float) -> Metric:
    return Metric(Side(of("frequency"), UNSEEN), Side(of("moment"), damping))


MEASURES = (
    Measure(
        "tokens",
        "embeddings: rows weighted by token frequency, columns by what a tied head reads",
        build=_build,
        importance=lambda of: 1.0,
        needs=frozenset({TOKENS}),
        damping=0.5,
        weighs_tokens=True,
    ),
)
