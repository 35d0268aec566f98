"""Fits modules and swaps them in, so that nothing is lost if a step fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tnlm.checkpoint.entries import Entry, build, network_of
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.layers.arranged import filled
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.fused import FusedLinear
from tnlm.layers.swap import Shelf, Swap
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target
from tnlm.tensors.contraction import chain
from tnlm.tensors.gauge import expand, fix
from tnlm.tensors.network import Factors
from tnlm.tensors.precision import as_stored, is_half, rounded, widened


def entry_of(target: Target, layer: LayerPlan, *, biased: bool) -> Entry:
    """Return what a checkpoint says of one matrix that is replaced as planned.

    Args:
        target: the matrix.
        layer: the decision.
        biased: whether a bias stands beside it.
    """
    shape = list(target.shape)
    if layer.format is None:
        return {"kind": "dense", "shape": shape, "bias": biased}
    entry = {
        "kind": target.kind,
        "shape": shape,
        "bias": biased or layer.bias,
        "format": layer.format,
        "options": dict(layer.spec),
    }
    if layer.bias:
        entry["bias_added"] = True
    if target.kind == "linear":
        entry["order"] = list(chain(network_of(entry)).order)
    return entry


def fit_target(
    target: Target,
    weight: Tensor,
    bias: Tensor | None,
    metric: Metric,
    layer: LayerPlan,
    output: Tensor | None = None,
    factors: Factors | None = None,
) -> tuple[Entry, nn.Module, float]:
    """Fit one matrix as planned.

    Args:
        target: the matrix.
        weight: ``(out, in)``, what to approximate.
        bias: the bias that stands beside it.
        metric: how the error is measured.
        layer: the decision.
        output: mean output ``(out,)`` wanted, for a metric with a mean; that of ``weight`` if None.
        factors: every factor in full, if they were fitted already.

    Returns:
        The entry, the built module on the weight's device in its dtype, and the relative error in
        the metric: of what is stored in half precision, else of the float64 factors, which differ
        by rounding. A metric with a mean moves the mean error into the bias.

    Raises:
        ModelError: if a number is too large for the weight's dtype.
    """
    entry = entry_of(target, layer, biased=bias is not None)
    if layer.format is None:
        return entry, filled(weight, bias), 0.0
    structure = get_format(layer.format)
    network = network_of(entry)
    # Built before fitting: long-lived tensors first, so that the heap stays compact.
    module = build(entry | {"padding_idx": None}, device=weight.device, dtype=weight.dtype)
    spec = from_dict(structure.spec, layer.spec)
    with torch.no_grad():
        stored = fix(network, factors or structure.fit(weight, metric, spec))
        kept = as_stored(network, stored, weight.dtype, target.name)
        seen = kept if is_half(weight.dtype) else stored
        rebuilt = structure.reconstruct(target.shape, spec, expand(network, widened(seen)))
        error = metric.relative(weight, rebuilt)
        if metric.mean is not None:
            wanted = weight.double() @ metric.mean if output is None else output
            shift = wanted - rebuilt @ metric.mean
            shift = shift if bias is None else bias.double() + shift
            bias = rounded(shift, weight.dtype, f"the bias of {target.name}")
        module.store(kept, bias)  # type: ignore[operator]
    return entry, module, error


def assemble(targets: Sequence[Target], modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return the module that holds the fitted targets of one module, given by target name."""
    first = targets[0]
    if not first.parts:
        return modules[first.name]
    return FusedLinear({target.parts[target.part]: modules[target.name] for target in targets})


def install(
    model: PreTrainedModel,
    swap: Swap,
    targets: Sequence[Target],
    fitted: Mapping[str, Entry],
    shelf: Shelf,
) -> tuple[dict[str, Entry], dict[str, str]]:
    """Put the fitted parts of one module, and its tied heads, into the model.

    Args:
        model: edited in place.
        swap: guards the model.
        targets: all targets of one module.
        fitted: entry of each target, by name.
        shelf: holds the module of each target, by name.

    Returns:
        Entries by module name, and tied parameters (name to the name it shares).
    """
    first = targets[0]
    old: Any = model.get_submodule(first.module)
    entry: Entry = fitted[first.name]
    module = assemble(targets, {target.name: shelf.take(target.name) for target in targets})
    if first.parts:
        parts = [{"name": t.parts[t.part], **fitted[t.name]} for t in targets]
        entry = {"kind": "fused", "parts": parts}
    module.requires_grad_(old.weight.requires_grad)  # what was frozen stays so
    bias, own = getattr(old, "bias", None), getattr(module, "bias", None)
    if not first.parts and bias is not None and own is not None and torch.equal(bias, own):
        module.bias = bias  # the same parameter, which other modules may share
    if isinstance(old, Conv1D):
        entry["conv1d"] = True
    if isinstance(module, FactorizedEmbedding) and isinstance(old, nn.Embedding):
        module.padding_idx = entry["padding_idx"] = old.padding_idx
    entries, tied = {first.module: entry}, {}
    for name in first.tied:
        entries[name], ties = _install_head(model, swap, name, first.module, entry, module)
        tied.update(ties)
    swap.replace(first.module, module.train(old.training))
    return entries, tied


def _install_head(
    model: PreTrainedModel, swap: Swap, name: str, source: str, entry: Entry, table: nn.Module
) -> tuple[Entry, dict[str, str]]:
    old = model.get_submodule(name)
    network = network_of(entry)
    head = FactorizedHead(network, bias=False, device="meta")
    for factor in network.factors:
        setattr(head, factor, getattr(table, factor))
    bias: nn.Parameter | None = getattr(old, "bias", None)
    head.bias = bias
    swap.replace(name, head.train(old.training))
    made = {**entry, "kind": "head", "bias": bias is not None}
    return made, {f"{name}.{factor}": f"{source}.{factor}" for factor in network.factors}


def replace_norm(model: nn.Module, swap: Swap, name: str, norm: nn.Module) -> None:
    """Put a tuned norm into the model, trainable as the old one was."""
    old = model.get_submodule(name)
    for parameter, before in zip(norm.parameters(), old.parameters(), strict=True):
        parameter.requires_grad_(before.requires_grad)
    swap.replace(name, norm.train(old.training))
