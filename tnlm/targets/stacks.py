"""Stacks: the same matrix of consecutive blocks, fitted as one, with one shared input factor."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry, build
from tnlm.targets.base import Target

PRIVATE = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "wo", "dense")
"""Endings of matrices that write to the residual stream; Basis Sharing leaves them alone."""


@dataclass(frozen=True)
class Stack(Target):
    """Several targets of one shape as one tall matrix, in the order of their blocks.

    Attributes:
        members: the targets.
    """

    members: tuple[Target, ...] = ()

    def weight(self, model: nn.Module) -> Tensor:
        """Return all members' weights, one below the other."""
        return torch.cat([member.weight(model) for member in self.members])

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None: each member keeps its own bias."""
        return None

    @property
    def copies(self) -> int:
        """How many matrices are applied, each with the shared factor."""
        return len(self.members)

    @property
    def most(self) -> int:
        """Numbers at the largest rank that one member can have, or one fewer than dense."""
        rank = min(self.members[0].shape)
        return min(self.params - 1, rank * sum(self.shape))


def stack(targets: Sequence[Target], blocks: int) -> list[Target]:
    """Return the targets with the same matrix of every ``blocks`` consecutive blocks as one.

    What stands in no block, writes to the residual stream, or is left over stays by itself.

    Source: Basis Sharing, Wang et al. 2024, arXiv 2410.03765.

    Example:
        >>> two = [Target(f"h.{i}.up", f"h.{i}.up", "linear", (8, 4)) for i in (0, 1)]
        >>> [(unit.name, unit.shape) for unit in stack(two, 2)]
        [('h.0.up+h.1.up', (16, 4))]
    """
    if blocks == 1:
        return list(targets)
    groups: dict[tuple[str, int], list[Target]] = {}
    for target in targets:
        groups.setdefault(_key(target, blocks), []).append(target)
    units: list[Target] = []
    for target in targets:
        members = groups[_key(target, blocks)]
        if target is members[0] and len(members) > 1 and len({m.shape for m in members}) == 1:
            units.append(_stacked(members))
        elif len(members) == 1 or len({m.shape for m in members}) > 1:
            units.append(target)
    return units


def _stacked(members: list[Target]) -> Stack:
    first = members[0]
    rows, columns = first.shape
    return Stack(
        "+".join(member.name for member in members),
        first.module,
        first.kind,
        (rows * len(members), columns),
        share=first.share,
        members=tuple(members),
    )


def _key(target: Target, blocks: int) -> tuple[str, int]:
    """Return what members of a stack have in common; unique for a target that has no stack."""
    found = re.search(r"\.(\d+)\.", f".{target.name}.")
    ending = target.module.rpartition(".")[2]
    if target.kind != "linear" or found is None or ending in PRIVATE:
        return target.name, -1
    kind = target.name.replace(f"{found[1]}.", "#.", 1)
    return kind, int(found[1]) // blocks


def unstack(
    unit: Stack, entry: Entry, module: nn.Module, biases: Sequence[Tensor | None]
) -> list[tuple[Entry, nn.Module]]:
    """Return the entry and the module of every member of a fitted stack.

    The input factor is copied into each; :func:`ties` makes it one.
    """
    found = []
    rows = unit.members[0].shape[0]
    like = next(module.parameters())
    factors = module.factors()  # type: ignore[operator]
    for index, (member, bias) in enumerate(zip(unit.members, biases, strict=True)):
        cut = factors["left"][index * rows : (index + 1) * rows]
        own = {**copy.deepcopy(entry), "shape": list(member.shape), "bias": bias is not None}
        own["shared"] = True
        made = build(own, device=like.device, dtype=like.dtype)
        made.store({**factors, "left": cut}, bias)  # type: ignore[operator]
        found.append((own, made))
    return found


def ties(unit: Stack) -> dict[str, str]:
    """Return the parameters that the members share: name to the name it shares."""
    source, *others = (f"{_path(member)}.right.weight" for member in unit.members)
    return dict.fromkeys(others, source)


def tie(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Make parameters one."""
    for target, source in pairs.items():
        owner = model.get_submodule(target.rpartition(".")[0])
        owner.weight = model.get_submodule(source.rpartition(".")[0]).weight


def _path(target: Target) -> str:
    return f"{target.module}.{target.parts[target.part]}" if target.parts else target.module
