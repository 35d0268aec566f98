"""Scales the curve of every unit by its measured divergence over its predicted loss."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from tqdm.auto import tqdm

from tnlm.allocation.curves import Curve
from tnlm.errors import EvaluationError
from tnlm.studies.level_search.levels import State

logger = logging.getLogger("tnlm")

Measure = Callable[[State], float]
"""Returns the divergence of a state; raises `EvaluationError` if it is not finite."""

TRUST = 0.5
"""Power of the scales that curves are multiplied by. Measured on few tokens, and on units alone,
scales overstate how units differ: 0.5 gave a better model than 1 (docs/benchmarks/quality.md)."""


def scaled(curves: Sequence[Curve], scales: Sequence[float]) -> list[Curve]:
    """Return curves with the predicted losses of each multiplied by its scale.

    Example:
        >>> from tnlm.allocation.candidate import Candidate
        >>> scaled([[Candidate((), 1, 2.0), Candidate((), 3, 0.0)]], [10.0])[0][0].loss
        20.0
    """
    return [
        [replace(candidate, loss=scale * candidate.loss) for candidate in curve]
        for curve, scale in zip(curves, scales, strict=True)
    ]


def scales_of(
    curves: Sequence[Curve],
    start: State,
    names: Sequence[str],
    measure: Measure,
    *,
    progress: bool = False,
) -> list[float]:
    """Return the measured divergence of every unit over its predicted loss.

    Each unit is compressed by itself: as in the start; or, where the start leaves it dense, at the
    level whose predicted loss is nearest to the mean of the others. A unit whose divergence is not
    finite or not positive gets the median of all scales, and is named in a warning.

    Args:
        curves: the candidates of every unit, dense last.
        start: the levels of the plan.
        names: of the units, for the warning.
        measure: returns the divergence of a state.
        progress: show a progress bar.
    """
    typical = _typical(curves, start)
    found = [
        _scale(curves, unit, _level(curve, start[unit], typical), measure)
        for unit, curve in enumerate(tqdm(curves, desc="scaling", disable=not progress))
    ]
    known = [scale for scale in found if scale is not None]
    middle = statistics.median(known) if known else 1.0
    unknown = [
        name
        for name, curve, scale in zip(names, curves, found, strict=True)
        if scale is None and curve[0].loss > 0
    ]
    if unknown:
        logger.warning(
            "no finite, positive divergence was measured for %s: the scale of these is the median",
            ", ".join(unknown),
        )
    return [middle if scale is None else scale for scale in found]


def _typical(curves: Sequence[Curve], start: State) -> float:
    """Return the mean predicted loss of the units that the start compresses; 1 if none."""
    losses = [curve[index].loss for curve, index in zip(curves, start, strict=True)]
    return statistics.fmean([loss for loss in losses if loss > 0] or [1.0])


def _level(curve: Curve, index: int, typical: float) -> int | None:
    """Return the level at which a unit is measured; None if it cannot be compressed."""
    if curve[index].loss > 0:
        return index
    lossy = [level for level, candidate in enumerate(curve) if candidate.loss > 0]
    return min(lossy, key=lambda k: abs(math.log(curve[k].loss / typical)), default=None)


def _scale(curves: Sequence[Curve], unit: int, level: int | None, measure: Measure) -> float | None:
    """Return the scale of one unit, or None if it has none."""
    if level is None:
        return None
    alone = [len(curve) - 1 for curve in curves]
    alone[unit] = level
    try:
        divergence = measure(tuple(alone))
    except EvaluationError:
        return None
    return divergence / curves[unit][level].loss if divergence > 0 else None
