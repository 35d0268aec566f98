"""Kinds of entries: what a checkpoint can say of a module, one file each, found by looking."""

from __future__ import annotations

from tnlm.checkpoint.kinds.base import EntryKind
from tnlm.utils.registry import Registry

KINDS: Registry[EntryKind] = Registry(__name__, "KIND", "kind of entry")
