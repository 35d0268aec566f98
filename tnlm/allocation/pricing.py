"""The cost of a whole model: parameters, bytes, multiply-adds per token."""

from __future__ import annotations

from torch import nn

from tnlm.targets.mixtures import matrix_macs
from tnlm.tensors.network import Cost


def model_cost(model: nn.Module) -> Cost:
    """Return the cost of a whole dense model, shared tensors counted once.

    Multiply-adds are those of its linear layers and of the experts that a token is routed to, see
    :func:`tnlm.targets.mixtures.matrix_macs`; the attention products are not included.
    """
    tensors = {id(p): p for p in model.parameters()}.values()
    return Cost(
        sum(p.numel() for p in tensors),
        sum(p.numel() * p.element_size() for p in tensors),
        matrix_macs(model),
    )
