"""Linear matrices as targets: the weight of a linear module, or one part of a fused weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnlm.checkpoint.entries import Entry, network_of
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling
from tnlm.layers.arranged import filled
from tnlm.layers.fused import FusedLinear, Layout, joined
from tnlm.layers.swap import Swap
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Fitted, Member, Read
from tnlm.targets.fit import fit_matrix
from tnlm.targets.stubs import widths
from tnlm.tensors.contraction import chain, stored_shapes
from tnlm.tensors.costs import macs
from tnlm.tensors.network import Cost, Factors, Network

BY_OUTPUT = ("gradient", "fisher", "slope", "lora_outputs", "lora_B")
"""Statistics with one row per row of the weight."""
BY_PART = ("lora_inputs", "lora_A")
"""Statistics that a fused module has once for every part."""
BY_TARGET = ("movement", "kept_rows", "kept_columns", "core")
"""Statistics that are kept by target, not by module."""


@dataclass(frozen=True)
class MatrixTarget(Member):
    """The weight of a linear module, or the rows of one part of a fused module.

    Attributes:
        part: index of the part in a fused module.
        layout: layout of the parts; None for an ordinary module.
    """

    part: int = 0
    layout: Layout | None = None

    kind = "linear"

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that it is of: a network can replace it, or some of its rows and columns."""
        return frozenset({self.kind, "submatrix"})

    @property
    def siblings(self) -> tuple[MatrixTarget, ...]:
        """All parts of the module, including this one."""
        if self.layout is None:
            return (self,)
        return tuple(
            replace(self, name=f"{self.module}.{name}", shape=(rows, self.shape[1]), part=part)
            for part, (name, rows) in enumerate(
                zip(self.layout.parts, self.layout.sizes, strict=True)
            )
        )

    @property
    def path(self) -> str:
        """Dotted name of the module that will hold the factors."""
        return self.module if self.layout is None else f"{self.module}.{self._part_name}"

    @property
    def _part_name(self) -> str:
        return "" if self.layout is None else self.layout.parts[self.part]

    @property
    def rows(self) -> slice | Tensor:
        """The target's rows in its module."""
        return slice(None) if self.layout is None else self.layout.rows(self.part)

    def part_of(self, module: nn.Module, stored: Tensor) -> Tensor:
        """Return the target's ``(out, in)`` part of a tensor laid out like the module's weight."""
        return _turned(module, stored)[self.rows]

    def write(self, module: nn.Module, stored: Tensor, values: Tensor) -> None:
        """Write values to the target's part of a tensor laid out like the module's weight."""
        _turned(module, stored)[self.rows] = values.to(stored)

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return the bias of the matrix, if any."""
        bias: Tensor | None = getattr(model.get_submodule(self.module), "bias", None)
        return None if bias is None else bias.detach()[self.rows]

    def added_bias(self, model: nn.Module) -> int:
        """Return the size of a bias that could be added; 0 if the matrix has one."""
        return self.shape[0] if self.bias(model) is None else 0

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return the target's rows of a statistic of outputs; those of inputs are shared."""
        tensor = read(self, name)
        if name in BY_TARGET:
            return tensor
        if name == "gradient" and tensor.dim() == 2:
            return tensor[self.rows][:, self.rows]
        if name in BY_PART and self.layout is not None:
            return tensor[self.part]
        return tensor[self.rows] if name in BY_OUTPUT else tensor

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of the factors and of a bias with ``extra`` parameters."""
        size = network.params * itemsize + network.index_bytes + extra * itemsize
        return Cost(network.params + extra, size, self.met(macs(network)))

    def packs(self, structure: str | None) -> bool:
        """Return True: all of it is linear layers."""
        return True

    def packed_shapes(self, network: Network | None) -> Sequence[tuple[int, int]]:
        """Return the shape of the matrix, or those in which its factors are stored."""
        if network is None:
            return [self.shape]
        return list(stored_shapes(network, chain(network).steps).values())

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest cost: strictly fewer parameters than the matrix."""
        return share_of(self, keep, max_macs, unit, extra)

    def entry(self, layer: LayerPlan, *, biased: bool) -> Entry:
        """Return the checkpoint entry of the replaced matrix."""
        shape = list(self.shape)
        if layer.format is None:
            return {"kind": "dense", "shape": shape, "bias": biased}
        others = (self.kinds - {self.kind}) & get_format(layer.format).kinds
        entry: Entry = {
            "kind": min(others, default=self.kind),
            "shape": shape,
            "bias": biased or layer.bias,
            "format": layer.format,
            "options": dict(layer.spec),
        }
        if layer.bias:
            entry["bias_added"] = True
        if entry["kind"] != self.kind:
            return entry
        return entry | {"order": list(chain(network_of(entry)).order)}

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Fit the matrix as planned."""
        own = self.weight(model)
        wanted = own if weight is None else weight.to(own)
        return self.fit_to(wanted, self.bias(model), layer, metric, output)

    def fit_to(
        self,
        weight: Tensor,
        bias: Tensor | None,
        layer: LayerPlan,
        metric: Metric,
        output: Tensor | None = None,
        factors: Factors | None = None,
    ) -> Fitted:
        """Fit a matrix like the target's; see `tnlm.targets.fit.fit_matrix`."""
        entry = self.entry(layer, biased=bias is not None)
        module, error = fit_matrix(entry, weight, bias, metric, layer, output, factors)
        return Fitted([(self, entry, module)], error)

    def assemble(self, group: Sequence[Member], modules: Mapping[str, nn.Module]) -> nn.Module:
        """Return the target's module, or that of all parts together."""
        if self.layout is None:
            return modules[self.name]
        parts = zip(self.layout.parts, (modules[m.name] for m in group), strict=True)
        return FusedLinear(dict(parts), self.layout.runs if self.layout.groups > 1 else ())

    def describe(
        self, model: nn.Module, group: Sequence[Member], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return the checkpoint entry of the module."""
        entry = dict(entries[self.name])
        if self.layout is not None:
            entry = _fused(self.layout, [entries[member.name] for member in group])
        if isinstance(model.get_submodule(self.module), Conv1D):
            entry["conv1d"] = True
        return {self.module: entry}, {}

    def install(
        self, model: nn.Module, swap: Swap, module: nn.Module, entries: Mapping[str, Entry]
    ) -> None:
        """Install the module; an unchanged bias stays the same parameter."""
        if isinstance(module, FusedLinear) and entries[self.module]["kind"] == "sliced":
            module = _merged(module)
        bias = getattr(model.get_submodule(self.module), "bias", None)
        own = getattr(module, "bias", None)
        super().install(model, swap, module, entries)
        if self.layout is None and bias is not None and own is not None and torch.equal(bias, own):
            module.bias = bias  # other modules may share it


def share_of(
    target: Member | Any, keep: float, max_macs: float, unit: str, extra: int, once: float = 1.0
) -> Ceiling:
    """Return the limits on parameters and multiply-adds for a fraction of a matrix's cost.

    Args:
        target: the matrix.
        keep: fraction of the dense cost in ``unit``.
        max_macs: most multiply-adds, as a multiple of the dense ones.
        unit: what ``keep`` counts.
        extra: parameters of a bias.
        once: multiply-adds of a network, as a fraction of those in the model.
    """
    params = target.most
    if unit != "macs":
        params = min(math.floor(keep * target.params + 1e-9), params)
    speed = min(max_macs, keep) if unit == "macs" else max_macs
    return Ceiling(params - extra, speed * target.params * once)


def _turned(module: nn.Module, stored: Tensor) -> Tensor:
    """Return a tensor laid out like a module's weight as ``(out, in)``."""
    return stored.T if isinstance(module, Conv1D) else stored  # GPT-2 stores (in, out)


def _fused(layout: Layout, parts: Sequence[Entry]) -> Entry:
    """Return the checkpoint entry of a fused module: one layer, if its parts are plain slices."""
    if all(part["kind"] == "sliced" and "precision" not in part for part in parts):
        shape, full = (
            [sum(p[key][0] for p in parts), parts[0][key][1]] for key in ("shape", "full")
        )
        entry: Entry = {**parts[0], "shape": shape, "full": full}
        return entry | ({"slabs": len(parts)} if layout.groups == 1 else {})
    named = [{"name": name, **part} for name, part in zip(layout.parts, parts, strict=True)]
    runs = {"runs": list(layout.runs)} if layout.groups > 1 else {}
    return {"kind": "fused", "parts": named, **runs}


def _merged(module: FusedLinear) -> nn.Module:
    """Return one layer that joins plain ones."""
    biases = [module.get_submodule(name).bias for name in module.parts]
    present: list[Any] = [bias for bias in biases if bias is not None]
    return filled(module.to_dense(), joined(present, module.runs) if present else None)


def matrices_of(
    name: str, module: nn.Linear | Conv1D, layout: Layout | None = None
) -> Iterator[MatrixTarget]:
    """Yield the matrices of a linear module as targets.

    Example:
        >>> layout = Layout(("q", "k", "v"), (8, 8, 8))
        >>> [target.name for target in matrices_of("h.0.attn.c_attn", Conv1D(24, 8), layout)]
        ['h.0.attn.c_attn.q', 'h.0.attn.c_attn.k', 'h.0.attn.c_attn.v']
    """
    whole = MatrixTarget(name, name, widths(module), layout=layout)
    yield from whole.siblings
