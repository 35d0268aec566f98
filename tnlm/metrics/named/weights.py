"""The metric that needs no data: the Frobenius norm."""

from tnlm.metrics.measure import Measure, effect
from tnlm.metrics.metric import Metric

MEASURES = (
    Measure(
        "identity",
        "Frobenius norm of the weight's error",
        build=lambda of, damping: Metric(),
        importance=effect(None),
    ),
)
