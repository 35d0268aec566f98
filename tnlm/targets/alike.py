"""Joint targets of experts: one matrix, or feed-forward layer, of all experts of a module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.decompositions import get_format
from tnlm.decompositions.alike import Alike as AlikeFormat
from tnlm.decompositions.base import Ceiling, Format
from tnlm.decompositions.slices import Slices, macs_of_one, one_slice, whole
from tnlm.layers.unfolded import unfolded
from tnlm.metrics.metric import Metric
from tnlm.metrics.several import Several
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Fitted, Member, Read, Target
from tnlm.targets.tensor_stacks import fit_slices
from tnlm.tensors.network import Cost, Network

STACK = "expert-stack"
"""What a format must be able to replace to take the same matrix of all experts as one tensor."""

LARGEST = 2**34
"""Bytes that the metrics of all experts may take, which a fit of them as one tensor holds."""


@dataclass(frozen=True)
class Alike(Target):
    """Targets of the same shape that get the same format and size, but are fitted separately.

    Attributes:
        each: the targets, one per expert.
    """

    each: tuple[Target, ...]

    @property
    def alike(self) -> tuple[Target, ...]:
        """The targets, one per expert."""
        return self.each

    @property
    def members(self) -> tuple[Target, ...]:
        """The matrices of all experts."""
        return tuple(member for one in self.each for member in one.members)

    @property
    def params(self) -> int:
        """Number of parameters of all matrices."""
        return sum(one.params for one in self.each)

    def taken(self, structure: Format[Any]) -> Format[Any]:
        """Return the version of a format for a stack of matrices."""
        return AlikeFormat(structure)

    def weight(self, model: nn.Module) -> Tensor:
        """Return all matrices, ``(count, out, in)``: a view if they are in one parameter."""
        return _as_one([one.weight(model) for one in self.each])

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None, since each matrix has its own bias."""
        return None

    def added_bias(self, model: nn.Module) -> int:
        """Return the total size of the biases that the matrices lack."""
        return sum(one.added_bias(model) for one in self.each)

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return the mean of a statistic over the experts."""
        return torch.stack([one.statistic(name, read) for one in self.each]).mean(0)

    def input_group(self, leaders: Mapping[str, str]) -> str:
        """Return the name, since no other target has the same inputs."""
        return self.name

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of all experts' factors; MACs count only the active experts."""
        count = len(self.each)
        one = replace(self.each[0], share=1.0).cost(network, itemsize, extra // count)
        return Cost(count * one.params, count * one.bytes, self.met(count * one.macs))

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return what the experts apply."""
        return [product for one in self.each for product in one.products(network)]

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest cost that one network may have."""
        own = extra // len(self.each)
        return self.each[0].budget(keep, max_macs, unit=unit, extra=own)

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Fit each expert separately; the error is that of all together."""
        if not isinstance(metric, Several):
            raise TypeError("alike targets are measured by Several")
        pieces: list[Any] = []
        total = squares = 0.0
        for one, part, scale in zip(self.each, metric.parts, metric.scales, strict=True):
            own = part()
            fitted = one.fit(model, replace(layer, name=one.name), own)
            energy = scale * own.norm(one.weight(model)) ** 2
            total, squares = total + energy, squares + energy * fitted.error**2
            pieces += fitted.pieces
        return Fitted(pieces, math.sqrt(squares / total) if total else 0.0)


@dataclass(frozen=True)
class AlikeMatrices(Alike):
    """One matrix of all experts: the same format and size for each, or one tensor of them all.

    In a format for stacks of experts they share factors, which are stored once.
    """

    kind = "linear"

    @property
    def kinds(self) -> frozenset[str]:
        """Matrices, and the stack of them if all their metrics fit in memory together."""
        rows, columns = self.shape
        size = 8 * len(self.each) * (rows**2 + columns**2)
        return frozenset({self.kind, STACK} if size <= LARGEST else {self.kind})

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Decide how many slices there are."""
        return {"slices": len(self.each), "stack": len(self.each)}

    def taken(self, structure: Format[Any]) -> Format[Any]:
        """Return the format for all matrices together, or for each alike."""
        if STACK in structure.kinds:
            return Slices(structure, len(self.each))
        return super().taken(structure)

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return what the factors of all cost; those of a network of all are shared."""
        if network.shape == self.shape:
            return super().cost(network, itemsize, extra)
        work = len(self.each) * macs_of_one(network)
        size = (network.params + extra) * itemsize + one_slice(network).index_bytes
        return Cost(network.params + extra, size, self.met(work))

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return what the experts apply, each its slice of a network of all."""
        if network is None or network.shape == self.shape:
            return super().products(network)
        return [one_slice(network)] * len(self.each)

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Fit each by itself, or all as one tensor."""
        if STACK not in get_format(str(layer.format)).kinds:
            return super().fit(model, layer, metric, weight, output)
        members = [one for one in self.each if isinstance(one, Member)]
        tall, stacked = whole(self.weight(model), metric)
        return fit_slices(members, model, layer, stacked, tall)


@dataclass(frozen=True)
class AlikeLayers(Alike):
    """The feed-forward layers of all experts, narrowed to one width."""

    kind = "channels"


UNITS: Mapping[str, type[Alike]] = {"linear": AlikeMatrices, "channels": AlikeLayers}
"""Classes that represent the targets of all experts, by their kind."""


def alike(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """Return the targets, with those of all experts of a module joined into one.

    Targets of other kinds that contain an expert's matrix are left out, since they would make the
    experts unequal.

    Example:
        >>> from transformers import MixtralConfig, MixtralModel
        >>> from tnlm.layers.unfolded import unfold
        >>> from tnlm.targets.selection import select
        >>> model = MixtralModel(MixtralConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        ...     num_local_experts=2))
        >>> _ = unfold(model)
        >>> [unit.name for unit in alike(model, select(model, ["experts"]).targets)]
        ['layers.0.mlp.experts.gate_proj', 'layers.0.mlp.experts.up_proj', ...]
    """
    places = [name for name, _ in unfolded(model)]
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(together(places, target.name), []).append(target)
    units: list[Target] = []
    for name, group in groups.items():
        if name == group[0].name:
            units.append(group[0])
        elif group[0].kind in UNITS:
            units.append(_made(name, group))
    return units


def together(places: Sequence[str], name: str) -> str:
    """Return the joint name of one expert's target and those of the other experts.

    Example:
        >>> together(["mlp.experts"], "mlp.experts.3.up_proj+mlp.experts.3.down_proj")
        'mlp.experts.up_proj+mlp.experts.down_proj'
    """
    return "+".join(_without_number(places, part) for part in name.split("+"))


def _without_number(places: Sequence[str], name: str) -> str:
    for place in places:
        number, _, inner = name.removeprefix(f"{place}.").partition(".")
        if name.startswith(f"{place}.") and number.isdigit():
            return f"{place}.{inner}"
    return name


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return further names by which matrices of experts may be chosen.

    They are the names of the module of all experts, of one matrix of all experts, and of the
    parameter that holds it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for place, experts in unfolded(model):
        for projection in experts.layout.shapes:
            parameter = f"{place}.{experts.layout.holder(projection)}"
            names = tuple(dict.fromkeys((place, f"{place}.{projection}", parameter)))
            for number in range(len(experts)):
                found[f"{place}.{number}.{projection}"] = names
    return found


def incomplete(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """Yield the name, chosen count and total count of every matrix chosen for some experts.

    Args:
        model: an unfolded model.
        names: names of the chosen modules.
    """
    chosen = set(names)
    for place, experts in unfolded(model):
        for projection in experts.layout.shapes:
            all_of = [f"{place}.{number}.{projection}" for number in range(len(experts))]
            count = sum(name in chosen for name in all_of)
            if 0 < count < len(all_of):
                yield f"{place}.{projection}", count, len(all_of)


def _made(name: str, group: list[Target]) -> Alike:
    first = group[0]
    return UNITS[first.kind](name, first.module, first.shape, tuple(group), share=first.share)


def _as_one(matrices: Sequence[Tensor]) -> Tensor:
    """Return matrices as one tensor: a view if they are evenly spaced in one storage."""
    first = matrices[0]
    starts = [matrix.storage_offset() for matrix in matrices]
    step = starts[1] - starts[0] if len(starts) > 1 else first.numel()
    place = first.untyped_storage().data_ptr()
    alone = any(
        matrix.untyped_storage().data_ptr() != place
        or matrix.stride() != first.stride()
        or start != starts[0] + number * step
        for number, (matrix, start) in enumerate(zip(matrices, starts, strict=True))
    )
    if alone or first.is_meta or step <= 0:
        return torch.stack(list(matrices))
    return first.as_strided((len(matrices), *first.shape), (step, *first.stride()), starts[0])
