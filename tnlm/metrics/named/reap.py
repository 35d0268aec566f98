"""The metric of experts that looks at what they add (REAP)."""

from __future__ import annotations

from tnlm.metrics.measure import Gathered, Measure
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side


def _build(of: Gathered, damping: float) -> Metric:
    return Metric(outputs=Side(of("reap").double().square(), damping))


MEASURES = (
    Measure(
        "reap",
        "experts weighted by gate times output norm (REAP)",
        build=_build,
        importance=lambda of: 1.0,
        needs=frozenset({"routing"}),
        damping=0.0,
        weighs_experts=True,
    ),
)
