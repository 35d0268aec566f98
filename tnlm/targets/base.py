"""The interface of targets, which are the parts of a model that are compressed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnlm.checkpoint.entries import Entry
from tnlm.decompositions.base import Ceiling, Format
from tnlm.layers.swap import Swap
from tnlm.metrics.measure import Measure
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.tensors.network import Cost, Network

Matrix = nn.Linear | Conv1D | nn.Embedding  # the modules whose weight is a matrix
Selector = str | type | Sequence["str | type"]
"""Words, names, a pattern or classes that select modules."""
Read = Callable[["Member", str], Tensor]
"""Returns a statistic of a target's module, by name."""


@dataclass(frozen=True)
class Fitted:
    """The fitted replacement of a target.

    Attributes:
        pieces: the checkpoint entry and the module of each matrix, by target.
        error: relative error of the target in its metric.
        ties: parameters to tie: each name with the name it shares.
        columns: the columns kept by matrices that lost inputs, by target name.
        metrics: the metric of what is left of each narrowed matrix, by target name; errors in
            them are relative to ``size``, the squared norm of the target.
    """

    pieces: Sequence[tuple[Target, Entry, nn.Module]]
    error: float
    ties: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    size: float = 0.0


@dataclass(frozen=True)
class Target(ABC):
    """A part of a model that is compressed as one ``(out, in)`` matrix.

    Each kind is one file that knows its matrix, statistics, cost and replacement; no other does.

    Attributes:
        name: unique name.
        module: dotted name of the module to replace.
        shape: shape of the matrix, ``(out, in)``.
        share: fraction of tokens that use it: k / E for one of E experts.
        kind: the kind that a format must support, e.g. ``"linear"``.
        unmeasured: why metrics of inputs cannot measure targets of this kind; empty if they can.
        ends_block: whether its output is usually the last that a block adds to its residual stream.
        adds_up: whether its error is that of several matrices, each by its effect on the loss.
    """

    name: str
    module: str
    shape: tuple[int, int]
    share: float = field(default=1.0, kw_only=True)

    kind: ClassVar[str]
    unmeasured: ClassVar[str] = ""
    ends_block: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds that it is of: a format for any of them can replace it."""
        return frozenset({self.kind})

    @property
    def members(self) -> tuple[Target, ...]:
        """The targets that this one represents; usually only itself."""
        return (self,)

    @property
    def alike(self) -> tuple[Target, ...]:
        """The targets that share one decision but are fitted separately; usually only itself."""
        return (self,)

    def taken(self, structure: Format[Any]) -> Format[Any]:
        """Return the version of a format that the target uses; usually the format itself."""
        return structure

    @property
    def params(self) -> int:
        """Number of parameters that are replaced."""
        return self.shape[0] * self.shape[1]

    @property
    def least(self) -> int:
        """Fewest parameters that a replacement can have."""
        return 0

    @property
    def most(self) -> int:
        """Most parameters that a replacement may have: fewer than the matrix."""
        return self.params - 1

    @abstractmethod
    def weight(self, model: nn.Module) -> Tensor:
        """Return the ``(out, in)`` matrix from a model."""

    def held(self, model: nn.Module) -> Sequence[Tensor]:
        """Return the tensors to replace."""
        weight: Any = model.get_submodule(self.module).weight
        return [weight]

    def values(self, model: nn.Module) -> Sequence[Tensor]:
        """Return the target's own parts of these tensors."""
        return [self.weight(model)]

    @abstractmethod
    def bias(self, model: nn.Module) -> Tensor | None:
        """Return the bias of the matrix, if any."""

    def added_bias(self, model: nn.Module) -> int:
        """Return the size of a bias that could be added to the matrix, or 0 if none could."""
        return 0

    @property
    def measured(self) -> Target:
        """The target whose inputs and gradients calibration measures."""
        return self

    def unmeasured_by(self, measure: Measure) -> str:
        """Return why a named metric cannot measure the target from data; empty if it can."""
        if measure.weighs_tokens:
            return f"metric={measure.name!r} measures embeddings alone"
        return self.unmeasured

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Options of formats that the target fixes, so that users and plans cannot set them."""
        return {}

    def metric(self, of: Callable[[Target], Metric]) -> Metric:
        """Return the metric of this target, from a function that returns a measured target's."""
        return of(self.measured)

    @abstractmethod
    def statistic(self, name: str, read: Read) -> Tensor:
        """Return a statistic of the measured target, from statistics of modules."""

    def input_group(self, leaders: Mapping[str, str]) -> str:
        """Return a name that is the same for all targets with the same input."""
        return leaders[self.module]

    def dense_cost(self, itemsize: int) -> Cost:
        """Return the cost of the dense target."""
        return Cost(self.params, self.params * itemsize, self.met(self.params))

    def met(self, work: int) -> int:
        """Return MACs averaged over all tokens of the model, some of which skip an expert."""
        return math.floor(work * self.share)

    def packs(self, structure: str | None) -> bool:
        """Return whether a format, or the dense matrix if None, can be stored in few bits here."""
        return False

    def packed_shapes(self, network: Network | None) -> Sequence[tuple[int, int]]:
        """Return the shapes of the layers, dense without a network, that few bits can store."""
        return ()

    @abstractmethod
    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of a network, with ``extra`` parameters, that replaces the target."""

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return what a pass applies, by shape or network; dense if that is None."""
        return [self.shape if network is None else network]

    @abstractmethod
    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest cost that a replacement, with ``extra`` parameters, may have.

        It is the fraction ``keep`` of the dense cost in ``unit`` (``"params"``, ``"bytes"`` or
        ``"macs"``), and ``max_macs`` times the dense multiply-adds.
        """

    def most_macs(self, max_macs: float) -> float:
        """Return the most multiply-adds that a candidate may have."""
        return max_macs * self.params

    @abstractmethod
    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Fit the replacement of the target.

        Args:
            model: holds the weights.
            layer: the plan's decision; its format is None for parts that stay dense.
            metric: of the error.
            weight: the matrix to approximate, instead of the model's own.
            output: the mean output ``(out,)`` to match, for a metric with a mean.
        """


@dataclass(frozen=True)
class Member(Target):
    """A target that is one matrix of a module, whose targets are all installed together."""

    @property
    def rows(self) -> slice | Tensor:
        """The target's rows in its module: a slice or an index."""
        return slice(0, self.shape[0])

    @property
    def siblings(self) -> tuple[Member, ...]:
        """All targets of its module, including this one."""
        return (self,)

    def part_of(self, module: nn.Module, stored: Tensor) -> Tensor:
        """Return the target's ``(out, in)`` part of a tensor laid out like the module's weight."""
        return stored[self.rows]

    def write(self, module: nn.Module, stored: Tensor, values: Tensor) -> None:
        """Write values to the target's part of a tensor laid out like the module's weight."""
        stored[self.rows] = values.to(stored)

    def view(self, module: Any) -> Tensor:
        """Return the ``(out, in)`` matrix from a module like the target's."""
        return self.part_of(module, module.weight.detach())

    def weight(self, model: nn.Module) -> Tensor:
        """Return the ``(out, in)`` matrix: a view of the tensor if its rows are adjacent."""
        return self.view(model.get_submodule(self.module))

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return the target's part of a statistic of its module."""
        return read(self, name)

    @property
    def path(self) -> str:
        """Dotted name of the module that will hold the factors."""
        return self.module

    def tried(self, model: nn.Module) -> Member | str:
        """Return the target in usable form, or why it is not usable, if that takes work to find."""
        return self

    @abstractmethod
    def entry(self, layer: LayerPlan, *, biased: bool) -> Entry:
        """Return the checkpoint entry of the replaced matrix."""

    def assemble(self, group: Sequence[Member], modules: Mapping[str, nn.Module]) -> nn.Module:
        """Return one module for all targets of a module, from each target's module by name."""
        return modules[self.name]

    @abstractmethod
    def describe(
        self, model: nn.Module, group: Sequence[Member], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return the checkpoint entries of the module, and of others that share its weight.

        They come from the entry of each target in ``group``, all those of the module, which is
        still dense in the model. Tied parameters follow: each name with the name it shares.
        """

    def install(
        self, model: nn.Module, swap: Swap, module: nn.Module, entries: Mapping[str, Entry]
    ) -> None:
        """Install the module with the factors, which its entry describes, in the model."""
        old: Any = model.get_submodule(self.module)
        module.requires_grad_(old.weight.requires_grad)  # frozen weights stay frozen
        swap.replace(self.module, module.train(old.training))


@dataclass(frozen=True)
class Finder:
    """Finds targets of one kind that each replace several matrices.

    Attributes:
        name: name of the kind.
        find: finds the targets, from a model and its chosen matrices.
        usable: returns those that can really be used, where that must be tried.
    """

    name: str
    find: Callable[[nn.Module, Sequence[Target]], Sequence[Target]]
    usable: Callable[[nn.Module, Sequence[Any]], Sequence[Target]] = lambda model, found: found
