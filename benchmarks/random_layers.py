"""Factorized layers of random numbers: speed does not depend on values, so nothing is fitted."""

from __future__ import annotations

from typing import Any

import torch

from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.splits import balanced_split
from tnlm.layers.linear import FactorizedLinear
from tnlm.tensors.gauge import ORDER
from tnlm.tensors.network import Factors, Network

Shape = tuple[int, int]
MODES = {"kronecker": 2, "tucker": 2, "tensor-train": 3}
"""Modes that each side of the matrix is split into, as equally as can be. Low rank splits nothing,
and a block tensor train chooses its own blocks."""
SCALE = 0.02


def spec_within(name: str, shape: Shape, keep: float) -> Any:
    """Return the largest spec that keeps a share of the numbers and of the multiply-adds, if any.

    Example:
        >>> spec_within("low-rank", (64, 64), 0.5)
        LowRankSpec(rank=18, gauge=True)
    """
    options = {}
    if name in MODES:
        rows, columns = (balanced_split(size, MODES[name]) for size in shape)
        options = {"out_split": rows, "in_split": columns}
    most = keep * shape[0] * shape[1]
    found = get_format(name).candidates(shape, options, Ceiling(most, most))
    return found[0] if found else None


def one_term(shape: Shape) -> Any:
    """Return the spec of a single Kronecker product.

    Example:
        >>> one_term((6, 4))
        KroneckerSpec(terms=1, out_split=(2, 3), in_split=(2, 2), gauge=False)
    """
    structure = get_format("kronecker")
    rows, columns = (balanced_split(size, 2) for size in shape)
    return structure.spec(terms=1, out_split=rows, in_split=columns, gauge=False)


def random_layer(network: Network, dtype: torch.dtype) -> FactorizedLinear:
    """Return a layer without bias that runs a network of random numbers."""
    return FactorizedLinear(network, bias=False, dtype=dtype).store(random_factors(network))


def random_low_rank(shape: Shape, keep: float, dtype: torch.dtype) -> FactorizedLinear:
    """Return a gauge-fixed low-rank layer that keeps a share of the numbers.

    Example:
        >>> random_low_rank((64, 48), 0.5, torch.float32).to_dense().shape
        torch.Size([64, 48])
    """
    network = get_format("low-rank").network(shape, spec_within("low-rank", shape, keep))
    return random_layer(network, dtype)


def random_factors(network: Network) -> Factors:
    """Return random factors as `tnlm.tensors.gauge.fix` would return fitted ones."""
    stored = {name: SCALE * torch.randn(network.shape_of(name)) for name in network.factors}
    if network.gauge is None:
        return stored
    name, rows, rank = network.gauge.factor, network.gauge_rows, network.sizes[network.gauge.bond]
    stored[name] = stored[name].reshape(rows, rank)[rank:]
    shuffled = torch.randperm(rows)
    pivots, free = shuffled[:rank], shuffled[rank:].sort().values
    stored[name + ORDER] = torch.cat([pivots, free]).argsort()
    return stored
