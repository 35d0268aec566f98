"""Entries: plain descriptions of replaced modules, and the modules built from them.

An entry is a checkpoint's description of one module. It is checked against the module it replaces
before anything is allocated, because a checkpoint is untrusted input. Each kind of entry is one
file of `tnlm.checkpoint.kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tnlm.checkpoint.kinds import KINDS
from tnlm.checkpoint.kinds.base import Entry as Entry
from tnlm.checkpoint.kinds.base import Place, grids
from tnlm.checkpoint.kinds.base import network_of as network_of
from tnlm.errors import CheckpointError, TnlmError
from tnlm.layers.packing import packed, unpacked

if TYPE_CHECKING:  # whose import imports the plug-in, and that this file
    from transformers import PreTrainedModel


def check_entry(name: str, entry: Any, module: nn.Module) -> None:
    """Raise `CheckpointError` unless an entry fits the module it replaces.

    Shapes must match the model's, so that no entry can ask for more memory than the dense model.
    """
    try:
        KINDS.get(entry["kind"]).check(entry, module)
        build(entry, device="meta", old=module)  # finds any other fault
    except TnlmError as error:
        raise CheckpointError(f"config.json does not fit the model at {name}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"config.json has a broken entry for {name}: {error!r}") from error


def build(
    entry: Entry,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    old: nn.Module | None = None,
) -> nn.Module:
    """Return the (uninitialised) module that an entry describes, in the place of an old one."""
    kind, bits = KINDS.get(entry["kind"]), grids(entry)
    if not bits:
        return kind.build(entry, Place(device, dtype, old))
    module = packed(kind.build(entry, Place("meta", dtype, old)), bits)
    return module.to_empty(device=device or torch.get_default_device())


def link(model: PreTrainedModel, entry: Entry, module: nn.Module) -> None:
    """Let a built module that stands in a model find others that it reads."""
    KINDS.get(entry["kind"]).link(model, module)


def before_dense(model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
    """Change what the whole model says of its modules before they are made dense.

    Raises:
        ModelError: if the model's class has no place for what they are.
    """
    for name, kind in KINDS.all().items():
        own = {module: entry for module, entry in entries.items() if entry["kind"] == name}
        if own:
            kind.before_dense(model, own)


def dense_module(entry: Entry, module: nn.Module) -> nn.Module:
    """Return an ordinary dense module with the weight of a built one."""
    return KINDS.get(entry["kind"]).dense(entry, unpacked(module))


def small_module(entry: Entry, module: nn.Module) -> nn.Module:
    """Return an ordinary module with these weights, without the channels that were dropped."""
    return KINDS.get(entry["kind"]).small(entry, unpacked(module))
