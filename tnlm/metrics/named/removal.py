"""The metric of experts from the increase of the loss when they are dropped."""

from __future__ import annotations

from tnlm.metrics.measure import GRADIENTS, Gathered, Measure
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side


def _build(of: Gathered, damping: float) -> Metric:
    return Metric(outputs=Side(of("removal"), damping))


MEASURES = (
    Measure(
        "removal",
        "experts weighted by the loss that dropping them adds",
        build=_build,
        importance=lambda of: 1.0,
        needs=frozenset({GRADIENTS, "removal"}),
        gathering={GRADIENTS: {"moment": "full"}},
        damping=0.0,
        weighs_experts=True,
    ),
)
