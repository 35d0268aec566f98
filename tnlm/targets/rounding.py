"""Stores what replaces a matrix in few bits, layer by layer in the order in which they run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.layers.adapters import matrix
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.packing import packed
from tnlm.layers.submatrix import SubmatrixLinear
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import among
from tnlm.precision.grid import Precision
from tnlm.precision.rounding import Rounded, nearest, with_feedback
from tnlm.targets.base import Fitted, Target
from tnlm.tensors.gauge import ORDER

DAMPING = 1e-8
"""Keeps second moments of inputs invertible."""


@torch.no_grad()
def rounded(
    fitted: Fitted, grid: Precision, metric: Callable[[Target], Metric], wanted: Tensor | None
) -> Fitted:
    """Return what replaces a target with its layers packed.

    Every layer is rounded under the second moment of its own inputs, as the layers before it have
    become; the last factor of a product is first fitted again, to make up for them.

    Args:
        fitted: what replaces it.
        grid: of the codes.
        metric: returns the metric of each matrix.
        wanted: the ``(out, in)`` matrix that a single piece approximates, and against which its
            error is measured; None for the layers around narrowed channels, where the errors of
            rounding are added to that of the fit, under the metrics that it gives.

    Source: the rounding is GPTQ's, Frantar et al. 2022, arXiv 2210.17323.
    """
    pieces, squared = [], fitted.error**2
    for target, entry, module in fitted.pieces:
        measured, kept = metric(target), fitted.columns.get(target.name)
        moment, before = _moment(measured, kept), matrix(module)
        codes = _round(module, grid, moment, wanted)
        made = _stored(module, grid, codes)
        pieces.append((target, {**entry, "precision": dict.fromkeys(codes, grid.to_dict())}, made))
        if wanted is not None:
            squared = measured.relative(wanted, matrix(made)) ** 2
        elif fitted.size and target.name in fitted.metrics:
            noise = fitted.metrics[target.name].norm(matrix(made) - before, keep=False)
            squared += noise**2 / fitted.size
    return replace(fitted, pieces=pieces, error=math.sqrt(squared))


def _stored(module: nn.Module, grid: Precision, codes: Mapping[str, Rounded]) -> nn.Module:
    """Return a module with packed layers that hold the codes."""
    biases = {name: getattr(module.get_submodule(name), "bias", None) for name in codes}
    made = packed(module, dict.fromkeys(codes, grid))
    for name, rounding in codes.items():
        layer: Any = made.get_submodule(name)
        layer.store(rounding, biases[name])
    return made


def _round(
    module: Any, grid: Precision, moment: Tensor | None, wanted: Tensor | None
) -> dict[str, Rounded]:
    """Return the codes of every layer in a module whose packing saves bytes, by its name there."""
    if isinstance(module, SubmatrixLinear):
        kept, core = module.columns_order[: module.columns], module.core.weight
        own = None if moment is None else among(moment, kept.to(moment.device))
        return {"core": _on_grid(core, core, grid, own)} if _saves(grid, core) else {}
    if not isinstance(module, FactorizedLinear):
        if not _saves(grid, module.weight):
            return {}
        return {"": _on_grid(module.weight, module.weight, grid, moment)}
    working: Any = copy.deepcopy(module).double()
    working.crossing = math.inf
    samples = _samples(moment, module.in_features, module.weight.device)
    found: dict[str, Rounded] = {}
    for name in module.chain.order:
        own, child = getattr(module, name).weight, getattr(working, name)
        inputs = _inputs(working, child, samples)
        if wanted is not None and inputs is not None and found and name == module.chain.order[-1]:
            _refit(working, child, inputs, samples @ wanted.double().T)
        if _saves(grid, own):
            second = None if inputs is None else inputs.T @ inputs
            found[name] = _on_grid(child.weight, own, grid, second)
            child.weight.copy_(found[name].values())
    return found


def _saves(grid: Precision, weight: Tensor) -> bool:
    rows, columns = weight.shape
    return grid.saves(rows, columns, weight.element_size())


def _on_grid(weight: Tensor, like: Tensor, grid: Precision, moment: Tensor | None) -> Rounded:
    """Round a matrix under the second moment of its inputs; to the nearest code without one."""
    if moment is None:
        return nearest(weight, grid, dtype=like.dtype)
    if moment.dim() == 1:  # columns that are weighed apart cannot make up for one another
        return nearest(weight, grid, moment, like.dtype)
    return with_feedback(weight, moment, grid, like.dtype)


def _inputs(working: nn.Module, child: nn.Module, samples: Tensor) -> Tensor | None:
    """Return what reaches a layer in a module ``(count, columns)``; None if it is not called."""
    caught: list[Tensor] = []
    handle = child.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    working(samples)
    handle.remove()
    return caught[0].reshape(-1, caught[0].shape[-1]) if caught else None


def _refit(working: Any, child: Any, inputs: Tensor, outputs: Tensor) -> None:
    """Fit the last factor to the outputs wanted of the whole, given what reaches it."""
    gauge = working.network.gauge
    if not working.flat or len(inputs) != len(outputs):
        return
    if gauge is not None and gauge.factor == working.chain.order[-1]:
        copied = working.network.sizes[gauge.bond]  # rows of its identity block, which stay
        outputs = outputs[:, getattr(working, gauge.factor + ORDER).argsort()][:, copied:]
    second = inputs.T @ inputs
    second.diagonal().add_(DAMPING * second.diagonal().mean())
    child.weight.copy_(torch.linalg.solve(second, inputs.T @ outputs).T)


def _samples(moment: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """Return inputs ``(columns, columns)`` whose second moment is the one given."""
    if moment is None:
        return torch.eye(columns, dtype=torch.float64, device=device)
    if moment.dim() == 1:
        return moment.clamp_min(0.0).sqrt().diag()
    mean = float(moment.diagonal().mean()) or 1.0
    eye = torch.eye(columns, dtype=moment.dtype, device=moment.device)
    root: Tensor = torch.linalg.cholesky(moment + DAMPING * mean * eye, upper=True)
    return root


def _moment(metric: Metric, kept: Tensor | None) -> Tensor | None:
    """Return the second moment of the inputs that a module reads, full or diagonal."""
    side = metric.start().inputs
    if side is None or kept is None:
        return None if side is None else side.values
    return among(side.values, kept)
