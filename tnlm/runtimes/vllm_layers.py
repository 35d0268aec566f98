"""Layers as chains of products that the plug-in of vLLM runs: descriptions and tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.errors import ModelError
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.packed import Packed
from tnlm.precision.grid import Precision
from tnlm.tensors.contraction import Step, passes_in, passes_out
from tnlm.tensors.gauge import ORDER

RUN = Precision(8, None)
"""The one precision of codes that is run: int8, with a scale for every row."""


@torch.no_grad()
def chain_of(name: str, module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return how a compressed layer is run, and its tensors; None for an ordinary one.

    Args:
        name: of the layer, for messages.
        module: made by tnlm.

    Raises:
        ModelError: if a factor is stored in bits that are not run, or a block train in any.

    Example:
        >>> from tnlm.tensors.network import Network
        >>> network = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> said, tensors = chain_of("fc", FactorizedLinear(network, bias=False))
        >>> [(step["tensor"], step["rows"], step["columns"]) for step in said["steps"]]
        [('factor0', 2, 5), ('factor1', 6, 2)]
        >>> tensors["factor1"].shape
        torch.Size([6, 2])
    """
    if isinstance(module, FactorizedLinear):
        return _factored(name, module)
    if isinstance(module, Packed):
        rows, columns = module.codes.shape[0], module.columns
        tensors = _stored(name, "weight", module)
        step = _step("weight", rows, columns, (rows,), int8=True)
        said: dict[str, Any] = {
            "shape": [rows, columns],
            "modes": [columns],
            "steps": [step],
            "permute": None,
        }
        return said, tensors
    return None


def _factored(name: str, module: FactorizedLinear) -> tuple[dict[str, Any], dict[str, Tensor]]:
    network, full = module.network, module.factors()
    steps, tensors = [], {}
    for number, step in enumerate(module.chain.steps):
        label, child = f"factor{number}", module.get_submodule(step.factor)
        side = _identity(module, step)
        if network.gauge is not None and step.factor == network.gauge.factor and side is None:
            held = {label: _laid_out(full[step.factor], network.factors[step.factor], step)}
        else:
            held = _stored(name, label, child)
        if step.blocks > 1 and label not in held:
            raise ModelError(
                f"{name} is a block train in int8, and vLLM's plug-in runs block trains in the "
                "model's own type only: compress without precision=, or in another format",
                argument="precision",
            )
        if side is not None:
            tensors["order"] = module.get_buffer(step.factor + ORDER).clone()
        rows, columns = next(iter(held.values())).shape
        said = _step(label, rows, columns, step.after, int8=label not in held)
        steps.append(said | {"blocks": step.blocks, "rest": list(step.rest), "identity": side})
        steps[-1]["permute"] = None if step.permute is None else list(step.permute)
        tensors |= held
    modes = [network.sizes[mode] for mode in network.inp]
    last = module.chain.permute
    said = {"shape": list(network.shape), "modes": modes, "steps": steps}
    return said | {"permute": None if last is None else list(last)}, tensors


def _step(label: str, rows: int, columns: int, after: Any, *, int8: bool) -> dict[str, Any]:
    """Return a step that multiplies all its inputs at once."""
    said = {"tensor": label, "rows": rows, "columns": columns, "blocks": 1, "permute": None}
    return said | {"rest": [], "after": list(after), "identity": None, "int8": int8}


def _identity(module: FactorizedLinear, step: Step) -> str | None:
    """Return on which side of a factor an identity block stands that is not multiplied."""
    if passes_out(module.network, step.factor, step.batch, step.contracted):
        return "out"
    return "in" if passes_in(module.network, step.factor, step.batch, step.kept) else None


def _laid_out(factor: Tensor, modes: str, step: Step) -> Tensor:
    """Return a factor as the matrix of its step."""
    layout = step.rows + step.contracted
    moved = factor.permute([modes.index(mode) for mode in layout])
    rows = math.prod(moved.shape[: len(step.rows)])
    return moved.reshape(rows, -1).contiguous()


def _stored(name: str, label: str, child: Any) -> dict[str, Tensor]:
    """Return the tensors of one matrix, as codes if it is packed."""
    if not isinstance(child, Packed):
        return {label: child.weight.detach().contiguous()}
    if child.precision != RUN:
        raise ModelError(
            f"{name} is stored as {child.extra_repr()}; vLLM's plug-in runs int8 with one scale a "
            "row: compress with precision='int8' and no group, or without precision",
            argument="precision",
        )
    codes, scales = child.codes.detach().clone(), child.scales.detach()[:, 0].contiguous()
    return {f"{label}_codes": codes, f"{label}_scales": scales}
