"""Stacks: one matrix of consecutive blocks, fitted together with a shared input factor."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry, build
from tnlm.decompositions.base import Ceiling
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Fitted, Read, Target
from tnlm.targets.matrix import BY_OUTPUT, MatrixTarget, share_of
from tnlm.tensors.costs import macs
from tnlm.tensors.network import Cost, Network
from tnlm.utils.names import split_at_block

PRIVATE = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "wo", "dense")
"""Endings of matrices that write to the residual stream, which Basis Sharing does not stack."""


@dataclass(frozen=True)
class Stack(Target):
    """Several targets of the same shape as one tall matrix, in the order of their blocks."""

    matrices: tuple[MatrixTarget, ...]

    kind = "linear"

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Disable identity blocks, since the factors are split among the members."""
        return {"gauge": False}

    @property
    def members(self) -> tuple[MatrixTarget, ...]:
        """The targets."""
        return self.matrices

    @property
    def most(self) -> int:
        """Parameters at the largest rank of one member, or one fewer than dense."""
        rank = min(self.members[0].shape)
        return min(self.params - 1, rank * sum(self.shape))

    def weight(self, model: nn.Module) -> Tensor:
        """Return all members' weights, concatenated by rows."""
        return torch.cat([member.weight(model) for member in self.members])

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None, since each member keeps its own bias."""
        return None

    def added_bias(self, model: nn.Module) -> int:
        """Return the total size of the biases that the members lack."""
        return self.shape[0]

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return the mean of statistics of inputs, and the blocks of statistics of outputs."""
        parts = [member.statistic(name, read) for member in self.members]
        if name == "gradient" and parts[0].dim() == 2:
            blocks: Tensor = torch.block_diag(*parts)
            return blocks
        return torch.cat(parts) if name in BY_OUTPUT else torch.stack(parts).mean(0)

    def input_group(self, leaders: Mapping[str, str]) -> str:
        """Return the name of the stack, since it reads the inputs of all its members."""
        return self.name

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of the factors: shared factors are stored once and applied everywhere."""
        copies = len(self.members)
        sizes = {**network.sizes, network.out: self.shape[0] // copies}
        size = network.params * itemsize + network.index_bytes + extra * itemsize
        work = copies * macs(replace(network, sizes=sizes))
        return Cost(network.params + extra, size, self.met(work))

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return what each member applies."""
        copies = len(self.members)
        rows = self.shape[0] // copies
        if network is None:
            return [(rows, self.shape[1])] * copies
        return [replace(network, sizes={**network.sizes, network.out: rows})] * copies

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest cost of a network, which has the shared factor once."""
        rows, columns = self.shape
        once = (rows + columns) / (rows + len(self.members) * columns)
        return share_of(self, keep, max_macs, unit, extra, once)

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Fit the tall matrix, and split the factors among the members."""
        tall = MatrixTarget(self.name, self.module, self.shape)
        found = tall.fit_to(self.weight(model), None, layer, metric)
        ((_, entry, module),) = found.pieces
        biases = [member.bias(model) for member in self.members]
        parts = unstack(self, entry, module, biases)
        pieces = [(m, *part) for m, part in zip(self.members, parts, strict=True)]
        return Fitted(pieces, found.error, ties(self))


def stack(targets: Sequence[Target], blocks: int) -> list[Target]:
    """Return the targets, with one matrix of every ``blocks`` consecutive blocks as a stack.

    Matrices outside blocks, those that write to the residual stream, and left-over ones are not
    stacked.

    Source: Basis Sharing, Wang et al. 2024, arXiv 2410.03765.

    Example:
        >>> two = [MatrixTarget(f"h.{i}.up", f"h.{i}.up", (8, 4)) for i in (0, 1)]
        >>> [(unit.name, unit.shape) for unit in stack(two, 2)]
        [('h.0.up+h.1.up', (16, 4))]
    """
    if blocks == 1:
        return list(targets)
    groups: dict[tuple[str, int], list[MatrixTarget]] = {}
    for target in targets:
        if isinstance(target, MatrixTarget):
            groups.setdefault(_key(target, blocks), []).append(target)
    units: list[Target] = []
    for target in targets:
        members = groups[_key(target, blocks)] if isinstance(target, MatrixTarget) else []
        if len(members) < 2 or len({member.shape for member in members}) > 1:
            units.append(target)
        elif target is members[0]:
            units.append(_stacked(members))
    return units


def _stacked(members: list[MatrixTarget]) -> Stack:
    first = members[0]
    rows, columns = first.shape
    return Stack(
        "+".join(member.name for member in members),
        first.module,
        (rows * len(members), columns),
        tuple(members),
        share=first.share,
    )


def _key(target: MatrixTarget, blocks: int) -> tuple[str, int]:
    """Return a key that all members of a stack share; unique for targets without a stack."""
    found = split_at_block(target.name)
    ending = target.module.rpartition(".")[2]
    if found is None or ending in PRIVATE:
        return target.name, -1
    before, block, after = found
    return f"{before}.#.{after}", block // blocks


def unstack(
    unit: Stack, entry: Entry, module: nn.Module, biases: Sequence[Tensor | None]
) -> list[tuple[Entry, nn.Module]]:
    """Return the entry and the module of every member of a fitted stack.

    The input factor is copied to each member, and later tied as :func:`ties` lists.
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
    """Return the parameters that the members share: each name with the name it shares."""
    source, *others = (f"{member.path}.right.weight" for member in unit.members)
    return dict.fromkeys(others, source)


def tie(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Tie parameters."""
    for target, source in pairs.items():
        owner = model.get_submodule(target.rpartition(".")[0])
        owner.weight = model.get_submodule(source.rpartition(".")[0]).weight
