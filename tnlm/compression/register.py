"""Adds choices from outside the library."""

from __future__ import annotations

from typing import Any

from tnlm.allocation import ALLOCATIONS
from tnlm.allocation.base import Allocation
from tnlm.compression.gatherers import GATHERERS
from tnlm.compression.gatherers.base import Gatherer
from tnlm.decompositions import FORMATS
from tnlm.decompositions.base import Format
from tnlm.errors import OptionError
from tnlm.evaluation.tasks import TASKS
from tnlm.evaluation.tasks.base import Task
from tnlm.metrics.measure import Measure
from tnlm.metrics.named import METRICS
from tnlm.recovery.kinds import RECOVERIES
from tnlm.recovery.kinds.base import RecoveryKind
from tnlm.schemes import SCHEMES
from tnlm.schemes.base import Scheme
from tnlm.targets import FINDERS
from tnlm.targets.base import Finder
from tnlm.utils.registry import Registry

KINDS: tuple[tuple[type, Registry[Any]], ...] = (
    (Format, FORMATS),
    (Scheme, SCHEMES),
    (Measure, METRICS),
    (Allocation, ALLOCATIONS),
    (Gatherer, GATHERERS),
    (Finder, FINDERS),
    (RecoveryKind, RECOVERIES),
    (Task, TASKS),
)


def register(item: Any) -> Any:
    """Register a choice from outside the library, and return it.

    Until the process ends, it can be used by name like the library's own choices. A checkpoint
    that uses a registered format can only be loaded after the format is registered.

    Args:
        item: a format, scheme, metric, allocation, gatherer, target finder, recovery or benchmark:
            an object such as each file of the library's own choices defines.

    Raises:
        OptionError: if its name is taken, or its class cannot be registered.

    Example:
        >>> from tnlm.schemes.base import Scheme
        >>> mine = Scheme("mine", "two products", ("kronecker",), "", defaults={"terms": 2})
        >>> register(mine).name
        'mine'
        >>> unregister(mine)
    """
    _registry_of(item).add(item)
    return item


def unregister(item: Any) -> None:
    """Remove a choice that :func:`register` added."""
    _registry_of(item).remove(item.name)


def _registry_of(item: Any) -> Registry[Any]:
    for kind, registry in KINDS:
        if isinstance(item, kind):
            return registry
    allowed = ", ".join(kind.__name__ for kind, _ in KINDS)
    raise OptionError(f"a {type(item).__name__} cannot be registered; allowed: {allowed}")
