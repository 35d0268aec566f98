"""Converts factors to the precision of a model: all finite, or an error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnlm.errors import ModelError
from tnlm.tensors.network import Factors, Network


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype has fewer bits than float32."""
    return torch.finfo(dtype).bits < 32


def as_stored(network: Network, factors: Factors, dtype: torch.dtype, name: str) -> Factors:
    """Convert factors to a dtype; row orders stay integers.

    If a factor is too large for the dtype, the factors are first rescaled to the same largest
    entry. A gauge-fixed factor keeps its scale, which its identity block fixes.

    Args:
        network: network of the factors.
        factors: the tensors to store, float64.
        dtype: dtype of the model's weight.
        name: name of the matrix, for the error.

    Raises:
        ModelError: if a factor is still too large.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 1, "a": 1, "i": 1})
        >>> large = {"left": torch.tensor([[1e6]]), "right": torch.tensor([[1e-2]])}
        >>> [float(f) for f in as_stored(net, large, torch.float16, "q_proj").values()]
        [100.0, 100.0]
    """
    if not all(_fits(factor, dtype) for factor in factors.values()):
        factors = _evened(network, factors)
    return {
        key: rounded(factor, dtype, f"the factor {key!r} of {name}")
        if factor.is_floating_point()
        else factor
        for key, factor in factors.items()
    }


def widened(factors: Factors) -> Factors:
    """Convert factors to float64; row orders stay integers."""
    return {k: f.double() if f.is_floating_point() else f for k, f in factors.items()}


def rounded(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Convert a tensor to a dtype.

    Raises:
        ModelError: if a value is too large for the dtype, or not finite.
    """
    made = tensor.to(dtype)
    if bool(made.isfinite().all()):
        return made
    largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
    raise ModelError(
        f"{what} reaches {largest:.3g}, but the largest {str(dtype).removeprefix('torch.')} is "
        f"{limit:.3g}; load the model in bfloat16 or float32, or ignore this matrix"
    )


def _fits(factor: Tensor, dtype: torch.dtype) -> bool:
    return not factor.is_floating_point() or bool(factor.to(dtype).isfinite().all())


def _evened(network: Network, factors: Factors) -> Factors:
    """Rescale all factors except a gauge-fixed one to the same largest entry."""
    fixed = network.gauge.factor if network.gauge else None
    free = {n: float(factors[n].abs().max()) for n in network.factors if n != fixed}
    if len(free) < 2 or not all(0 < size < math.inf for size in free.values()):
        return factors
    even = math.exp(sum(math.log(size) for size in free.values()) / len(free))
    return factors | {name: factors[name] * (even / size) for name, size in free.items()}
