"""What matrices and whole models cost: parameters, bytes, multiply-adds per token."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from tnlm.targets.base import Target
from tnlm.targets.channels import FeedForward
from tnlm.targets.mixtures import matrix_macs
from tnlm.tensors.contraction import chain
from tnlm.tensors.costs import is_table, macs, row_macs
from tnlm.tensors.network import Cost, Network


def dense_cost(target: Target, itemsize: int) -> Cost:
    """Return the cost of a target as it is; looking an embedding up takes no multiply-adds."""
    heads = len(target.tied) if target.kind == "embedding" else 1
    return Cost(target.params, target.params * itemsize, _met(target, target.params * heads))


def _met(target: Target, work: int) -> int:
    """Return multiply-adds per token of the model, which an expert meets now and then."""
    return math.floor(work * target.share)


def network_cost(target: Target, network: Network, itemsize: int, extra: int = 0) -> Cost:
    """Return the cost of a target once a network, and ``extra`` numbers, replace it."""
    if isinstance(target, FeedForward):
        width = network.shape[0]
        rest = target.params - target.saved(width)
        work = width * (target.params // target.shape[0])
        return Cost(rest, rest * itemsize, _met(target, work))
    size = network.params * itemsize + network.index_bytes
    if target.kind == "linear":
        work = macs(network)
        if target.copies > 1:  # what is shared is stored once, but applied in every member
            sizes = {**network.sizes, network.out: target.shape[0] // target.copies}
            work = target.copies * macs(replace(network, sizes=sizes))
        return Cost(network.params + extra, size + extra * itemsize, _met(target, work))
    rows = target.shape[0]
    # A tied head passes through the factors, or rebuilds the rows and multiplies by them.
    lookup = row_macs(network)
    head = target.params + rows * lookup if is_table(network) else chain(network).macs
    return Cost(network.params, size, lookup + head * len(target.tied))


def model_cost(model: nn.Module) -> Cost:
    """Return the cost of a whole dense model, shared tensors counted once.

    Multiply-adds are those of its linear layers, and of the experts that a token meets, see
    :func:`tnlm.targets.mixtures.matrix_macs`; attention's own products come on top.
    """
    tensors = {id(p): p for p in model.parameters()}.values()
    return Cost(
        sum(p.numel() for p in tensors),
        sum(p.numel() * p.element_size() for p in tensors),
        matrix_macs(model),
    )
