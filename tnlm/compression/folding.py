"""Experts are unfolded while a job runs, and folded into stacks when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from tnlm.checkpoint.description import TnlmConfig
from tnlm.checkpoint.entries import Entry, build
from tnlm.compression.request import Request
from tnlm.layers.experts import CHILD, FactorizedExperts
from tnlm.layers.unfolded import UnfoldedExperts, unfold, unfolded
from tnlm.targets.checks import check_model

MATRICES = frozenset({"linear", "channels"})
"""Kinds of targets that are matrices; others, as whole experts, are found in the 3-D layout."""


def unfold_for(model: PreTrainedModel, request: Request) -> None:
    """Unfold the experts of a model if a request's formats replace matrices.

    Whatever fails later, `tnlm.utils.undo.leaves_model` puts the modules back.
    """
    check_model(model)
    if request.kinds & MATRICES:
        unfold(model)


def fold(model: PreTrainedModel, config: TnlmConfig) -> None:
    """Put stacks in the place of unfolded experts, and the original where nothing was compressed.

    Args:
        model: with what was fitted for the experts installed.
        config: says what; of experts it says so together afterwards.
    """
    for name, experts in list(unfolded(model)):
        start = f"{name}."
        mine = {key: entry for key, entry in config.modules.items() if key.startswith(start)}
        if not mine:
            kept: Any = experts.original
            model.set_submodule(name, kept.module)
            continue
        entry = _entry(name, experts, mine, config.tied)
        model.set_submodule(name, _folded(entry, experts))
        config.modules = {k: v for k, v in config.modules.items() if k not in mine}
        config.modules[name] = entry
        config.tied = {k: v for k, v in config.tied.items() if not k.startswith(start)}


def _entry(
    name: str, experts: UnfoldedExperts, mine: Mapping[str, Entry], tied: Mapping[str, str]
) -> Entry:
    """Return what a checkpoint says of all experts: that of the first, as all are alike."""
    layout = experts.layout
    parts = []
    for projection, shape in layout.shapes.items():
        dense = {"kind": "dense", "shape": list(shape), "bias": layout.biased}
        first = f"{name}.0.{projection}"
        part = {"name": CHILD[projection], **mine.get(first, dense)}
        if "shared" in part:
            sources = {source for source in tied.values() if source.startswith(f"{first}.")}
            part["shared"] = sorted(source.split(".")[-2] for source in sources)
        parts.append(part)
    return {"kind": "experts", "experts": layout.experts, "parts": parts}


def _folded(entry: Entry, experts: UnfoldedExperts) -> FactorizedExperts:
    like = next(experts.parameters())
    made: Any = build(entry, device=like.device, dtype=like.dtype, old=experts)
    original: Any = experts.original
    for projection in experts.layout.shapes:
        stack = made.stack(projection)
        stack.store([getattr(expert, projection) for expert in _each(experts)])
        learns = getattr(original.module, experts.layout.holder(projection)).requires_grad
        stack.requires_grad_(learns)
    folded: FactorizedExperts = made.train(experts.training)
    return folded


def _each(experts: UnfoldedExperts) -> list[Any]:
    return [experts[number] for number in range(len(experts))]
