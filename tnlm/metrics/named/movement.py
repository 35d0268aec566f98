"""Metrics of matrices that are first pruned by the movement of their weights in training."""

from tnlm.metrics.measure import MOVEMENT, Measure, effect
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

MEASURES = (
    Measure(
        "movement",
        "columns of pruned matrices weighted by the movement of their weights (LPAF)",
        build=lambda of, damping: Metric(inputs=Side(of("movement"), damping)),
        importance=effect("movement"),
        needs=frozenset({MOVEMENT}),
    ),
    Measure(
        "pruned",
        "Frobenius norm of the error of pruned matrices (LPAF without weights)",
        build=lambda of, damping: Metric(),
        importance=effect(None),
        needs=frozenset({MOVEMENT}),
    ),
)
