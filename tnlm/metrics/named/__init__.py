"""Named metrics: one file per family, discovered automatically."""

from __future__ import annotations

from tnlm.metrics.measure import Measure
from tnlm.utils.registry import Registry

METRICS: Registry[Measure] = Registry(__name__, "MEASURES", "metric")


def measures() -> dict[str, Measure]:
    """Return all metrics by name.

    Example:
        >>> "two-sided" in measures()
        True
    """
    return METRICS.all()


def get_measure(name: str) -> Measure:
    """Return a named metric.

    Raises:
        OptionError: if the name is unknown.

    Example:
        >>> sorted(get_measure("two-sided").needs)
        ['gradients', 'inputs']
    """
    return METRICS.get(name)
