"""The experts of a module, each matrix of theirs a stack of one structure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tnlm.checkpoint.kinds import KINDS
from tnlm.checkpoint.kinds.base import Entry, EntryKind, MatrixKind, Place, by, network_of
from tnlm.errors import CheckpointError
from tnlm.layers.expert_layout import DOWN, GATE, UP, ExpertLayout, layout_of
from tnlm.layers.experts import CHILD, FactorizedExperts, Stack, StackedFactors, StackedLinear
from tnlm.layers.rows import set_counts
from tnlm.layers.unfolded import UnfoldedExperts, bare

CHILD_OF = {child: projection for projection, child in CHILD.items()}


class Experts(EntryKind):
    """How many ``experts`` there are, and ``parts``: an entry for each matrix, with a ``name``."""

    name = "experts"

    def check(self, entry: Entry, module: nn.Module) -> None:
        """Compare the number, the names and the shapes with those of the module."""
        layout = layout_of(module)
        if not isinstance(layout, ExpertLayout):
            raise CheckpointError(
                f"the model has {type(module).__name__} there, which holds no known experts"
            )
        count, parts = entry["experts"], entry["parts"]
        if type(count) is not int or not 1 <= count <= layout.experts:
            raise CheckpointError(f"experts={count!r}; the model has {layout.experts}")
        names = [CHILD[projection] for projection in layout.shapes]
        if [part["name"] for part in parts] != names:
            raise CheckpointError(f"its parts must be {', '.join(names)}")
        for part in parts:
            kind, shape = _kind(part), layout.shapes[CHILD_OF[part["name"]]]
            if kind.shape(part) != shape:
                raise CheckpointError(
                    f"{part['name']} is {by(kind.shape(part))}, but the model has {by(shape)}"
                )
            _check_shared(part, count)
            kind.check_part(part | ({"shared": True} if "shared" in part else {}), layout.biased)
        _check_channels({CHILD_OF[part["name"]]: part["shape"] for part in parts})

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return `FactorizedExperts`, with the code of the module that held the experts."""
        if place.old is None:
            raise CheckpointError("experts take over the code of a module; none was given")
        layout, owner = origin(place.old)
        count = entry["experts"]
        if count < layout.experts:
            set_counts(owner, layout.experts, count)
        parts = {CHILD_OF[part["name"]]: part for part in entry["parts"]}
        stacks = {name: _stack(count, part, **place.tensors) for name, part in parts.items()}
        return FactorizedExperts(replace(layout, experts=count), owner, stacks)

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return a module of the original class, with 3-D parameters."""
        weights, biases = {}, {}
        learns: dict[str, bool] = {}
        for part in entry["parts"]:
            name, stack = CHILD_OF[part["name"]], getattr(module, part["name"])
            layers: list[Any] = [
                _kind(part).dense(part, stack.layer(number)) for number in range(entry["experts"])
            ]
            weights[name] = torch.stack([layer.weight.detach() for layer in layers])
            if layers[0].bias is not None:
                biases[name] = torch.stack([layer.bias.detach() for layer in layers])
            holder = module.layout.holder(name)
            learns[holder] = learns.get(holder, False) or next(stack.parameters()).requires_grad
        made = bare(module.owner, module.layout)
        for name, tensor in module.layout.stacked(weights, biases).items():
            trained = learns[name.removesuffix("_bias")]
            made.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
        return made


def origin(old: Any) -> tuple[ExpertLayout, nn.Module]:
    """Return the layout that a module of experts has or had, and its code without parameters."""
    if isinstance(old, FactorizedExperts | UnfoldedExperts):
        owner: Any = old.owner
        return old.layout, owner
    layout = layout_of(old)
    if not isinstance(layout, ExpertLayout):
        raise CheckpointError(f"{type(old).__name__} holds no experts that are known")
    return layout, bare(old, layout)


def _stack(count: int, part: Entry, **made: Any) -> Stack:
    if "format" not in part:
        rows, columns = part["shape"]
        return StackedLinear(count, (rows, columns), bias=part["bias"], **made)
    order = part["order"]
    made |= {"order": order, "shared": part.get("shared", ())}
    return StackedFactors(count, network_of(part), bias=part["bias"], **made)


def _check_shared(part: Entry, count: int) -> None:
    """Raise `CheckpointError` unless some factors are shared, and all are smaller than dense."""
    if "shared" not in part:
        return
    network, shared = network_of(part), part["shared"]
    if not isinstance(shared, list) or not set(shared) <= network.factors.keys():
        raise CheckpointError(f"shared={shared!r}; allowed: some of {list(network.factors)}")
    sizes = {name: network.size(modes) for name, modes in network.factors.items()}
    params = sum(size * (1 if name in shared else count) for name, size in sizes.items())
    if network.gauge is not None:
        copies = 1 if network.gauge.factor in shared else count
        params -= copies * network.sizes[network.gauge.bond] ** 2
    if params > count * math.prod(part["shape"]):
        raise CheckpointError(f"{part['options']} is larger than the dense matrices")


def _kind(part: Entry) -> MatrixKind:
    kind = KINDS.get(part["kind"])
    if not isinstance(kind, MatrixKind) or not kind.partial:
        raise CheckpointError(f"kind={part['kind']!r} cannot be a matrix of experts")
    return kind


def _check_channels(shapes: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless all matrices have the same channels between them."""
    (_, read), produced = shapes[DOWN], [shapes[name][0] for name in (GATE, UP) if name in shapes]
    if any(width != read for width in produced):
        raise CheckpointError(f"{DOWN} reads {read} channels, but {produced} are produced")


KIND = Experts()
