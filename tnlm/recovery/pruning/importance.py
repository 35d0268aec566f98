"""The importance of groups for the loss, estimated only from the gradients of adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tnlm.calibration.lora_sums import lora_gradient
from tnlm.errors import TrainingError
from tnlm.layers.adapters import Adapter
from tnlm.recovery.pruning.groups import Groups

KINDS = ("taylor", "squared")
"""Kinds of saliency: |ĝ w| as in the published code, or (ĝ w)² as in the paper."""


def importances(groups: Groups, adapters: Mapping[str, Adapter], kind: str = "taylor") -> Tensor:
    """Return the importance of every group, in float64.

    For each matrix, the saliencies are summed over each group and divided by their L2 norm over the
    groups; the results are added over the matrices.

    Args:
        groups: the groups of one block.
        adapters: adapters of all its matrices, after a backward pass.
        kind: ``"taylor"`` or ``"squared"``.

    Raises:
        TrainingError: if a gradient is not finite.

    Source: LoRAPrune (Zhang et al. 2024, arXiv 2305.18403); the division is the published code's.
    """
    total: Tensor | None = None
    for cut in groups.cuts:
        adapter = adapters[cut.module]
        saliency = _gradient(adapter) * adapter.merged()
        saliency = saliency.abs_() if kind == "taylor" else saliency.square_()
        sums = saliency.sum(1 - cut.axis, dtype=torch.float64)
        sums = sums.reshape(cut.slabs.parts, groups.count, cut.slabs.size).sum((0, 2))
        norm = sums.norm()
        if not bool(norm.isfinite()):
            raise TrainingError(f"{cut.module}: the gradients of its adapter are not finite")
        share = sums / norm if norm > 0 else sums
        total = share if total is None else total + share.to(total)
    if total is None:
        raise TrainingError(f"{groups.parent}: no matrices")
    return total


def _gradient(adapter: Adapter) -> Tensor:
    """Return ĝ, the estimate of the gradient of the merged weight.

    It is the decrease of s B A by one step of size 1 on A and B. Since ∂B = s G Aᵀ and ∂A = s Bᵀ G,
    where G is the true gradient, ĝ = s² G if B = 0 and A is square and orthogonal. The paper has no
    s.
    """
    if adapter.A.grad is None or adapter.B.grad is None:
        raise TrainingError("an adapter has no gradient: the loss does not depend on its matrix")
    a, b = adapter.A.detach(), adapter.B.detach()
    return adapter.scaling * lora_gradient(a, b, adapter.A.grad, adapter.B.grad, step=1.0)
