"""Resizes tables and heads: cuts rows off, or adds new ones at the end.

A row of the table is held by the factors with the vocabulary's mode. If only one factor has this
mode, the others are a basis that all rows share; a new row is its best fit in that basis, which
does not change. If every factor has it, each row is its own network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry, build, network_of
from tnlm.errors import TargetError
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.linear import FactorizedLinear
from tnlm.tensors.contraction import pairwise
from tnlm.tensors.gauge import fix
from tnlm.tensors.network import Factors, Network

Fit = Callable[[Tensor], Factors]
"""Returns the factors of rows ``(count, width)``, for networks whose rows share nothing."""

Table = FactorizedEmbedding | FactorizedHead
Factored = Table | FactorizedLinear


def holders(network: Network) -> list[str]:
    """Return the factors that hold the rows of the matrix.

    Raises:
        TargetError: if rows share factors, so that none can be added or changed alone.

    Example:
        >>> holders(Network({"left": "vr", "right": "ri"}, "v", "i", {"v": 9, "r": 2, "i": 4}))
        ['left']
    """
    found = [name for name, modes in network.factors.items() if network.out in modes]
    if len(network.out) == 1 and len(found) in (1, len(network.factors)):
        return found
    raise TargetError(
        f"the rows share their factors ({network.equation}), so none can be added, removed or "
        "changed alone; make the model dense with tnlm.to_dense, then compress it again"
    )


@torch.no_grad()
def fit_rows(network: Network, factors: Factors, rows: Tensor, fit: Fit) -> Factors:
    """Fit rows ``(count, width)``, and return their part of each factor that holds rows.

    Args:
        network: network of the matrix.
        factors: all factors.
        rows: the rows to approximate, as closely as the other factors allow.
        fit: fits rows of networks in which every row is independent.
    """
    found = holders(network)
    if len(found) == len(network.factors):
        return fit(rows)
    [holder] = found
    modes = network.factors[holder]
    shape = [network.sizes[mode] for mode in modes]
    axis = modes.index(network.out)
    others = [size for number, size in enumerate(shape) if number != axis]
    size = math.prod(others)
    units = torch.eye(size, dtype=torch.float64, device=rows.device)
    each = units.reshape(size, *others).movedim(0, axis)
    full = [each if n == holder else factors[n].double() for n in network.factors]
    basis = pairwise(network)(full).reshape(size, -1)
    found_rows = torch.linalg.lstsq(basis.T.cpu(), rows.double().T.cpu(), driver="gelsd").solution.T
    held = found_rows.reshape(len(rows), *others).movedim(0, axis)
    return {holder: held.to(rows.device)}


def resized(
    entry: Entry, module: Factored, rows: Tensor, bias: Tensor | None, fit: Fit
) -> nn.Module:
    """Return a module of the entry's shape: as many old rows as fit, then new ones.

    Args:
        entry: entry of the new module.
        module: the old module; not changed.
        rows: the new rows ``(count, width)``, possibly none.
        bias: the whole bias of a head.
        fit: see :func:`fit_rows`.

    Raises:
        TnlmError: if rows share factors, or are too few for the ranks.
    """
    network = network_of(entry)
    kept = network.shape[0] - len(rows)
    old = module.factors()
    new = fit_rows(module.network, old, rows, fit) if len(rows) else {}
    factors = dict(old)
    for name in holders(module.network):
        axis = network.factors[name].index(network.out)
        part = old[name].detach().narrow(axis, 0, kept)
        added = [new[name].to(part)] if name in new else []
        factors[name] = torch.cat([part, *added], axis)
    first = next(module.parameters())
    made: Any = build(entry | {"padding_idx": None}, device=first.device, dtype=first.dtype)
    if isinstance(module, FactorizedLinear):
        _store(made, module, factors)
    else:
        made.store(factors)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made.train(module.training)  # type: ignore[no-any-return]


@torch.no_grad()
def _store(made: FactorizedLinear, old: FactorizedLinear, factors: Factors) -> None:
    """Store factors in a layer; those that hold no rows stay bit for bit the same."""
    gauge, [holder] = made.network.gauge, holders(made.network)
    if gauge != old.network.gauge or (gauge is not None and gauge.factor == holder):
        exact = {name: factor.double() for name, factor in factors.items()}
        fixed = fix(made.network, exact)
        like = next(made.parameters()).dtype
        made.store({k: v.to(like) if v.is_floating_point() else v for k, v in fixed.items()})
        return
    step = next(step for step in made.chain.steps if step.factor == holder)
    modes = made.network.factors[holder]
    child: Any = getattr(made, holder)
    laid = factors[holder].permute([modes.index(mode) for mode in step.rows + step.contracted])
    child.weight.copy_(laid.reshape(child.weight.shape))
    for name, tensor in made.state_dict().items():
        if name not in (f"{holder}.weight", "bias"):
            tensor.copy_(old.state_dict()[name])
