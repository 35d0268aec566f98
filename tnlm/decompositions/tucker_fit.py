"""Factors of a Tucker decomposition: HOSVD and HOOI, and low rank where it is the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnlm.decompositions import _tensorly
from tnlm.decompositions.base import as_tensor
from tnlm.decompositions.hooi import hooi, hosvd
from tnlm.metrics.metric import Metric
from tnlm.tensors.linalg import truncated_svd
from tnlm.tensors.network import Factors, Network


def is_low_rank(network: Network) -> bool:
    """Return whether the one factor beside the core has all outputs, or all inputs, as its mode."""
    names = [name for name in network.factors if name.startswith("mode")]
    return len(names) == 1 and network.factors[names[0]][0] in (network.out, network.inp)


def low_rank_factors(network: Network, weight: Tensor, metric: Metric) -> Factors:
    """Return the best factors of such a network under a separable metric, in closed form."""
    [name] = [name for name in network.factors if name.startswith("mode")]
    mode, bond = tuple(network.factors[name])
    left, right = metric.low_rank(weight, network.sizes[bond])
    side, core = (left, right) if mode == network.out else (right.T, left)
    return {"core": core.reshape(network.shape_of("core")), name: side}


def nearest(tensor: Tensor, ranks: Sequence[int]) -> Factors:
    """Fit a tensor (out modes, then in modes) in the Frobenius norm."""
    if tensor.dim() == 2:
        svd = truncated_svd(tensor, ranks[0])
        return {"left": svd.u, "right": svd.s[:, None] * svd.vh}
    modes = reduced_modes(tuple(tensor.shape), ranks)
    if not modes:
        return {"core": tensor}
    factors, core = hooi(tensor, hosvd(tensor, [ranks[mode] for mode in modes], modes), modes)
    return {"core": core} | {f"mode{k}": u for k, u in zip(modes, factors, strict=True)}


def orthogonal(factors: Factors) -> Factors:
    """Return the same tensor with orthonormal factors, except the core (or the right factor)."""
    found = dict(factors)
    carrier = "core" if "core" in found else "right"
    for name in [name for name in factors if name != carrier]:
        found[name], r = torch.linalg.qr(factors[name])
        axis = int(name.removeprefix("mode")) if carrier == "core" else 0
        found[carrier] = torch.tensordot(r, found[carrier], ([1], [axis])).movedim(0, axis)
    return found


def hosvd_error(
    weight: Tensor, out_split: Sequence[int], in_split: Sequence[int], ranks: Sequence[int]
) -> float:
    """Return the relative error of the HOSVD of a matrix reshaped to its modes."""
    tensor = as_tensor(weight, out_split, in_split)
    modes = reduced_modes(tuple(tensor.shape), ranks)
    total = float(tensor.square().sum())
    factors = hosvd(tensor, [ranks[mode] for mode in modes], modes)
    core = _tensorly.multi_mode_dot(tensor, factors, modes)
    if total == 0.0:
        return 0.0
    error: float = max(1.0 - float(core.square().sum()) / total, 0.0) ** 0.5
    return error


def reduced_modes(dims: Sequence[int], ranks: Sequence[int]) -> list[int]:
    """Return the modes whose rank is below their size."""
    return [k for k, (size, rank) in enumerate(zip(dims, ranks, strict=True)) if rank < size]
