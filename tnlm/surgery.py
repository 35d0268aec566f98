"""Fits modules and swaps them in, so that nothing is lost if a step fails."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tnlm.calibration.metrics import Metric
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.decompositions.gauge import expand, fix
from tnlm.layers.arranged import filled
from tnlm.layers.build import Entry, build, network_of
from tnlm.layers.contraction import chain
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.fused import FusedLinear
from tnlm.network import Factors
from tnlm.planning import LayerPlan
from tnlm.targets import Target


class Swap:
    """Replaces modules; undoes it all if the block it guards fails, attributes and config too.

    The tensors of replaced modules wait in temporary files, so that memory holds the model once.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> try:
        ...     with Swap(model) as swap:
        ...         swap.replace("0", nn.Identity())
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     print(model[0])
        Linear(in_features=2, out_features=2, bias=True)
    """

    def __init__(self, model: nn.Module) -> None:
        """Guard a model."""
        self._model = model
        self._replaced: list[tuple[str, nn.Module]] = []
        self._spilled: dict[nn.Parameter, Path] = {}
        self._biases: list[tuple[nn.Parameter, Tensor]] = []
        owners = [owner for owner in (model, getattr(model, "config", None)) if owner is not None]
        self._attributes = [(vars(owner), dict(vars(owner))) for owner in owners]
        self._directory = tempfile.TemporaryDirectory(prefix="tnlm-")

    def spill(self, name: str) -> None:
        """Move a module's weight to a file, ahead of its replacement."""
        weight = self._model.get_submodule(name)._parameters.get("weight")
        if weight is not None and weight not in self._spilled:
            path = Path(self._directory.name) / f"{len(self._spilled)}.safetensors"
            save_file({"weight": weight.detach().contiguous()}, path)
            self._spilled[weight] = path
            weight.data = weight.data.new_empty(0)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of another, whose weight moves to a file."""
        self.spill(name)
        old = self._model.get_submodule(name)
        bias = old._parameters.get("bias")
        if bias is not None:  # the new module may hold it, and train it
            self._biases.append((bias, bias.detach().clone()))
        self._replaced.append((name, old))
        self._model.set_submodule(name, module)

    def __enter__(self) -> Swap:
        """Start."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Restore every module and weight if there was an error; drop the files."""
        if kind is not None:
            for weight, path in self._spilled.items():
                # A copy: the file is about to go.
                weight.data = load_file(path)["weight"].clone().to(weight.data.device)
            for bias, values in self._biases:
                bias.data.copy_(values)
            for name, module in reversed(self._replaced):
                self._model.set_submodule(name, module)
            for now, before in self._attributes:
                now.clear()
                now.update(before)
        self._spilled.clear()
        self._directory.cleanup()


class Shelf:
    """Keeps fitted modules in temporary files until all are ready to be put into the model.

    Example:
        >>> with Shelf() as shelf:
        ...     shelf.put("a", nn.Linear(2, 3))
        ...     shelf.take("a")
        Linear(in_features=2, out_features=3, bias=True)
    """

    def __init__(self) -> None:
        """Start empty."""
        self._modules: dict[str, tuple[nn.Module, torch.device]] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="tnlm-")

    def put(self, name: str, module: nn.Module) -> None:
        """Move a module's tensors to a file."""
        device = next(module.parameters()).device
        tensors = {key: value.contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, self._path(name))
        self._modules[name] = module.to("meta"), device

    def take(self, name: str) -> nn.Module:
        """Return a module with its tensors on their device again."""
        module, device = self._modules.pop(name)
        module.to_empty(device=device)
        module.load_state_dict(load_file(self._path(name)))
        return module

    def _path(self, name: str) -> Path:
        return Path(self._directory.name) / f"{name}.safetensors"

    def __enter__(self) -> Shelf:
        """Start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the files."""
        self._directory.cleanup()


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
        The entry, the built module on the weight's device in its dtype, and the relative error of
        its float64 factors in the metric. A metric with a mean moves the mean error into the bias.
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
        rebuilt = structure.reconstruct(target.shape, spec, expand(network, stored))
        error = metric.relative(weight, rebuilt)
        if metric.mean is not None:
            wanted = weight.double() @ metric.mean if output is None else output
            shift = wanted - rebuilt @ metric.mean
            bias = (shift if bias is None else bias.double() + shift).to(weight.dtype)
        module.store(cast_factors(stored, weight), bias)  # type: ignore[operator]
    return entry, module, error


def cast_factors(factors: Factors, like: Tensor) -> Factors:
    """Return factors in another tensor's dtype; the integers of a gauge stay as they are."""
    return {k: v.to(like.dtype) if v.is_floating_point() else v for k, v in factors.items()}


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
