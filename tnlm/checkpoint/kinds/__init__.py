"""Kinds of entries by which a checkpoint describes a module: one file each, discovered."""

from __future__ import annotations

from tnlm.checkpoint.kinds.base import EntryKind
from tnlm.utils.registry import Registry

KINDS: Registry[EntryKind] = Registry(__name__, "KIND", "kind of entry")
