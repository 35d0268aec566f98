"""Tensor stacks: one matrix of consecutive blocks as the slices of a third-order tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import build
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling, from_dict, matrix_shape
from tnlm.decompositions.slices import one_slice
from tnlm.decompositions.stack_tucker import SLICE
from tnlm.metrics.metric import Metric
from tnlm.metrics.stacked import Stacked
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Finder, Fitted, Member, Target
from tnlm.targets.fit import fit_factors
from tnlm.targets.matrix import MatrixTarget, share_of
from tnlm.targets.stacks import Stack
from tnlm.tensors.contraction import chain
from tnlm.tensors.network import Cost, Factors, Network
from tnlm.utils.names import split_at_block

BLOCKS = 2
"""Number of consecutive blocks whose matrices are stacked."""


@dataclass(frozen=True)
class TensorStack(Stack):
    """Matrices of the same shape as slices of a tensor, each with its own metric.

    They are fitted together and share all factors without a slice index; each is then executed as a
    separate network.
    """

    kind = "stack"

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Fix the number of slices."""
        return {"slices": len(self.members), "stack": len(self.members)}

    @property
    def most(self) -> int:
        """Most parameters of a replacement: fewer than the matrices."""
        return self.params - 1

    def metric(self, of: Callable[[Target], Metric]) -> Metric:
        """Measure the error of each matrix in its own metric."""
        members = [of(member) for member in self.members]
        return Stacked(members, [member.shape[0] for member in self.members])

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of the factors: shared factors are stored once and applied everywhere."""
        one, copies = one_slice(network), len(self.members)
        size = (network.params + extra) * itemsize + copies * one.index_bytes
        return Cost(network.params + extra, size, self.met(copies * chain(one).macs))

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return what each member applies."""
        if network is None:
            return super().products(network)
        return [one_slice(network)] * len(self.members)

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest cost of all factors together."""
        return share_of(self, keep, max_macs, unit, extra)

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Fit all slices, and return each matrix with its part of the factors."""
        return fit_slices(self.members, model, layer, metric, self.weight(model))


def fit_slices(
    members: Sequence[Member], model: nn.Module, layer: LayerPlan, metric: Metric, tall: Tensor
) -> Fitted:
    """Fit matrices as the slices of one tensor, and return each with its part of the factors.

    Args:
        members: the matrices, of one shape.
        model: holds their biases.
        layer: the decision.
        metric: of all, one below the other.
        tall: the matrices, one below the other.
    """
    structure = get_format(str(layer.format))
    whole = replace(layer, shape=matrix_shape(tall))
    network = structure.network(whole.shape, from_dict(structure.spec, layer.spec))
    with torch.no_grad():
        kept, rebuilt = fit_factors(network, tall, metric, whole)
    pieces = []
    for index, member in enumerate(members):
        bias = member.bias(model)
        own = replace(layer, spec={**layer.spec, "slices": 1})
        entry = member.entry(own, biased=bias is not None) | {"shared": True}
        module: Any = build(entry, device=tall.device, dtype=tall.dtype)
        pieces.append((member, entry, module.store(_slice(network, kept, index), bias)))
    return Fitted(pieces, metric.relative(tall, rebuilt), _ties(members, network))


def _ties(members: Sequence[Member], network: Network) -> dict[str, str]:
    """Return the parameters that the members share: each name with the name it shares."""
    first, *others = (member.path for member in members)
    shared = [name for name, modes in network.factors.items() if SLICE not in modes]
    return {f"{path}.{n}.weight": f"{first}.{n}.weight" for path in others for n in shared}


def _slice(network: Network, kept: Factors, index: int) -> Factors:
    """Return the stored factors of one slice."""
    found = dict(kept)
    for name, modes in network.factors.items():
        if SLICE in modes:
            found[name] = kept[name].narrow(modes.index(SLICE), index, 1)
    return found


def across_blocks(model: nn.Module, targets: Sequence[Target]) -> list[TensorStack]:
    """Return the stacks of one matrix in every ``BLOCKS`` consecutive blocks.

    Example:
        >>> four = [MatrixTarget(f"h.{i}.up", f"h.{i}.up", (8, 4)) for i in range(4)]
        >>> [stack.name for stack in across_blocks(nn.Module(), four)]
        ['h.0.up+h.1.up', 'h.2.up+h.3.up']
    """
    groups: dict[tuple[str, str, int], list[MatrixTarget]] = {}
    for target in targets:
        found = split_at_block(target.name)
        if isinstance(target, MatrixTarget) and found is not None:
            before, block, after = found
            groups.setdefault((before, after, block // BLOCKS), []).append(target)
    return [
        _stacked(members)
        for members in groups.values()
        if len(members) == BLOCKS and len({member.shape for member in members}) == 1
    ]


def _stacked(members: Sequence[MatrixTarget]) -> TensorStack:
    first = members[0]
    return TensorStack(
        "+".join(member.name for member in members),
        first.module,
        (first.shape[0] * len(members), first.shape[1]),
        tuple(members),
        share=first.share,
    )


FINDER = Finder("stack", across_blocks)
