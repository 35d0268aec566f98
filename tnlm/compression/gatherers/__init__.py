"""Gatherers of statistics from data: one file each, discovered automatically."""

from __future__ import annotations

from tnlm.compression.gatherers.base import Gatherer
from tnlm.utils.registry import Registry

GATHERERS: Registry[Gatherer] = Registry(__name__, "GATHERER", "gatherer")


def gatherers() -> list[Gatherer]:
    """Return every gatherer, in execution order."""
    return sorted(GATHERERS.all().values(), key=lambda gatherer: not gatherer.first)
