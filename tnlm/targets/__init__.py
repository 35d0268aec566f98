"""Targets of compression: one file for each kind, discovered automatically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import nn

from tnlm.targets.base import Finder, Target
from tnlm.utils.registry import Registry

FINDERS: Registry[Finder] = Registry(__name__, "FINDER", "kind of target")


def joint_targets(
    model: nn.Module, targets: Sequence[Target], kinds: Set[str] | None = None
) -> list[Target]:
    """Return the joint targets, of some or all kinds, that may replace several of the targets."""
    finders = [each for name, each in FINDERS.all().items() if kinds is None or name in kinds]
    return [found for each in finders for found in each.find(model, targets)]


def usable_targets(
    model: nn.Module,
    found: Sequence[Target],
    kinds: Set[str],
    planned: Mapping[str, str] | None = None,
) -> list[Target]:
    """Return the usable joint targets of some kinds, of which no two share a matrix.

    If several could replace a matrix, the kind that is first by name does, unless a plan names one.
    What one kind finds unusable is not tried again under the same name by another.

    Args:
        model: holds the matrices.
        found: the joint targets.
        kinds: the kinds that may be used.
        planned: the kind of the target that replaces each matrix, where a plan says so.
    """
    used: list[Target] = []
    taken: set[str] = set()
    refused: set[str] = set()
    planned = planned or {}
    for name, finder in FINDERS.all().items():
        if name in kinds:
            tried = [each for each in found if each.kind == name and each.name not in refused]
            usable = finder.usable(model, tried)
            refused |= {each.name for each in tried} - {each.name for each in usable}
            for each in usable:
                names = {member.name for member in each.members}
                if not names & taken and all(planned.get(one, name) == name for one in names):
                    used.append(each)
                    taken |= names
    return used
