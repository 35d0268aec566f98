"""Factors in the precision in which a model stores them: all finite, or an error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tnlm.errors import ModelError
from tnlm.tensors.network import Factors, Network


def is_half(dtype: torch.dtype) -> bool:
    """Tell whether numbers of a dtype have fewer bits than float32."""
    return torch.finfo(dtype).bits < 32


def as_stored(network: Network, factors: Factors, dtype: torch.dtype, name: str) -> Factors:
    """Return factors in a dtype; orders of rows stay whole numbers.

    Where one is too large for the dtype, scale moves between the factors first: all get the same
    largest entry. A gauge-fixed factor keeps its scale, as it stands beside an identity.

    Args:
        network: what the factors belong to.
        factors: the tensors to store, float64.
        dtype: of the model's weight.
        name: of the matrix, for the error.

    Raises:
        ModelError: if a factor is too large all the same.

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
    """Return factors in float64; orders of rows stay whole numbers."""
    return {k: f.double() if f.is_floating_point() else f for k, f in factors.items()}


def rounded(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return a tensor in a dtype.

    Raises:
        ModelError: if a number is too large for it, or not finite.
    """
    made = tensor.to(dtype)
    if bool(made.isfinite().all()):
        return made
    largest, limit = float(tensor.abs().max()), torch.finfo(dtype).max
    raise ModelError(
        f"{what} reaches {largest:.3g}, and {str(dtype).removeprefix('torch.')} ends at "
        f"{limit:.3g}; load the model in bfloat16 or float32, or ignore this matrix"
    )


def _fits(factor: Tensor, dtype: torch.dtype) -> bool:
    return not factor.is_floating_point() or bool(factor.to(dtype).isfinite().all())


def _evened(network: Network, factors: Factors) -> Factors:
    """Return the same network with equal largest entries in all factors that may be scaled."""
    fixed = network.gauge.factor if network.gauge else None
    free = {n: float(factors[n].abs().max()) for n in network.factors if n != fixed}
    if len(free) < 2 or not all(0 < size < math.inf for size in free.values()):
        return factors
    even = math.exp(sum(math.log(size) for size in free.values()) / len(free))
    return factors | {name: factors[name] * (even / size) for name, size in free.items()}
