"""Metrics from the Fisher information of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tnlm.metrics.measure import FISHER, Gathered, Measure
from tnlm.metrics.metric import Elementwise, Metric
from tnlm.metrics.sides import Side


def _sides(rows: bool, columns: bool) -> Callable[[Gathered, float], Metric]:
    def build(of: Gathered, damping: float) -> Metric:
        fisher = of("fisher").double()
        outputs = Side(fisher.mean(1), damping) if rows else None
        inputs = fisher.mean(0)
        if outputs is not None:  # so that the scale counts once, not twice
            inputs = inputs / outputs.mean
        return Metric(outputs, Side(inputs, damping) if columns else None)

    return build


def _mean(of: Gathered) -> float:
    return float(of("fisher").mean())


def _any(of: Gathered) -> float:
    """Return 1, since the metric already is the effect on the loss; 0 if the data shows none."""
    return float(_mean(of) > 0)


fisher = partial(Measure, importance=_any, needs=frozenset({FISHER}))

MEASURES = (
    fisher(
        "fisher-inputs",
        "columns weighted by their Fisher information (FWSVD)",
        _sides(rows=False, columns=True),
    ),
    fisher(
        "fisher-outputs",
        "rows weighted by their Fisher information",
        _sides(rows=True, columns=False),
    ),
    fisher(
        "fisher-both",
        "rows and columns weighted by their Fisher information",
        _sides(rows=True, columns=True),
    ),
    fisher(
        "fisher-elements",
        "every entry weighted by its Fisher information (TFWSVD)",
        lambda of, damping: Elementwise(of("fisher"), damping),
        importance=_mean,  # its weights are scaled to mean 1
        elementwise=True,
    ),
)
