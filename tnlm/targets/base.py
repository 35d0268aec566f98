"""The contract of a target: what one kind of thing that is compressed knows about itself."""

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
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.tensors.network import Cost, Network

Matrix = nn.Linear | Conv1D | nn.Embedding
"""The modules whose weight is a matrix."""
Selector = str | type | Sequence["str | type"]
"""Words, names, a pattern or classes that choose modules."""
Read = Callable[["Member", str], Tensor]
"""Returns a statistic of the module that a target stands in, by name."""


@dataclass(frozen=True)
class Fitted:
    """What replaces a target.

    Attributes:
        pieces: for every matrix, its entry in a checkpoint and its module, by target.
        error: relative error of the target in its metric.
        ties: parameters that become one, name to the name it shares.
    """

    pieces: Sequence[tuple[Target, Entry, nn.Module]]
    error: float
    ties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target(ABC):
    """Something that is compressed as one ``(out, in)`` matrix.

    A kind of target is one file: it says where its matrix is, what is known and what is paid for
    it, and what is put in its place. Nobody else asks of which kind a target is.

    Attributes:
        name: unique.
        module: dotted name of the module that is replaced.
        shape: ``(out, in)`` of the matrix.
        share: of the tokens that meet it: k of E for one of E experts.
        kind: what a format must be able to replace, e.g. ``"linear"``.
        unmeasured: why calibration data cannot measure targets of this kind; empty if it can.
    """

    name: str
    module: str
    shape: tuple[int, int]
    share: float = field(default=1.0, kw_only=True)

    kind: ClassVar[str]
    unmeasured: ClassVar[str] = ""

    @property
    def members(self) -> tuple[Target, ...]:
        """The targets that this one stands for: itself, unless it stands for several."""
        return (self,)

    @property
    def alike(self) -> tuple[Target, ...]:
        """The targets that are decided together and fitted one by one: itself alone, usually."""
        return (self,)

    def taken(self, structure: Format[Any]) -> Format[Any]:
        """Return a format as the target takes it: as it is, unless it stands for several."""
        return structure

    @property
    def params(self) -> int:
        """Parameters of all that is replaced."""
        return self.shape[0] * self.shape[1]

    @property
    def least(self) -> int:
        """Parameters that a network in its place must have at least."""
        return 0

    @property
    def most(self) -> int:
        """Parameters that a replacement may have at most: fewer than the matrix itself."""
        return self.params - 1

    @abstractmethod
    def weight(self, model: nn.Module) -> Tensor:
        """Return the ``(out, in)`` matrix in a model."""

    def held(self, model: nn.Module) -> Sequence[Tensor]:
        """Return the tensors that are replaced."""
        weight: Any = model.get_submodule(self.module).weight
        return [weight]

    def values(self, model: nn.Module) -> Sequence[Tensor]:
        """Return the parts of those tensors that are the target's own."""
        return [self.weight(model)]

    @abstractmethod
    def bias(self, model: nn.Module) -> Tensor | None:
        """Return the bias that belongs to the matrix, if any."""

    def added_bias(self, model: nn.Module) -> int:
        """Return the size of a bias that the matrix could be given; 0 where it cannot."""
        return 0

    @property
    def measured(self) -> Target:
        """The target whose inputs and gradients are measured."""
        return self

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Options of formats that the target decides: users and plans cannot."""
        return {}

    def metric(self, of: Callable[[Target], Metric]) -> Metric:
        """Return the metric of this target's matrix, given what returns that of a measured one."""
        return of(self.measured)

    @abstractmethod
    def statistic(self, name: str, read: Read) -> Tensor:
        """Return a statistic of the measured target, from those of the modules."""

    def input_group(self, leaders: Mapping[str, str]) -> str:
        """Return a name that is the same for all targets of one input."""
        return leaders[self.module]

    def dense_cost(self, itemsize: int) -> Cost:
        """Return what the target costs as it is."""
        return Cost(self.params, self.params * itemsize, self.met(self.params))

    def met(self, work: int) -> int:
        """Return multiply-adds by the token of the model, of which an expert meets some only."""
        return math.floor(work * self.share)

    @abstractmethod
    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return what the target costs once a network, and ``extra`` parameters, replace it."""

    @abstractmethod
    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the most that a network in its place may have.

        Args:
            keep: fraction of what ``unit`` counts.
            max_macs: multiply-adds, as a multiple of the dense ones.
            unit: ``"params"``, ``"bytes"`` or ``"macs"``.
            extra: parameters of a bias that the matrix is given.
        """

    def most_macs(self, max_macs: float) -> float:
        """Return the most multiply-adds that a candidate may take."""
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
        """Return what replaces the target as planned.

        Args:
            model: holds the weights.
            layer: the decision; its format is None for parts that stay dense.
            metric: how the error is measured.
            weight: what to approximate in place of the model's own matrix.
            output: mean output ``(out,)`` wanted, for a metric with a mean.
        """


@dataclass(frozen=True)
class Member(Target):
    """A target that is one matrix of one module, and stands for nothing else.

    The targets of one module are put into the model together.
    """

    @property
    def rows(self) -> slice | Tensor:
        """Where the target's rows are in its module: a slice or an index."""
        return slice(0, self.shape[0])

    @property
    def siblings(self) -> tuple[Member, ...]:
        """All that its module holds, the target among them."""
        return (self,)

    def part_of(self, module: nn.Module, stored: Tensor) -> Tensor:
        """Return the target's ``(out, in)`` part of a tensor laid out like the module's weight."""
        return stored[self.rows]

    def write(self, module: nn.Module, stored: Tensor, values: Tensor) -> None:
        """Put values into the target's part of a tensor laid out like the module's weight."""
        stored[self.rows] = values.to(stored)

    def view(self, module: Any) -> Tensor:
        """Return the ``(out, in)`` matrix in a module like the target's."""
        return self.part_of(module, module.weight.detach())

    def weight(self, model: nn.Module) -> Tensor:
        """Return the ``(out, in)`` matrix; a view of the model's own tensor, if its rows adjoin."""
        return self.view(model.get_submodule(self.module))

    def statistic(self, name: str, read: Read) -> Tensor:
        """Return the part of its module's statistic that belongs to the target."""
        return read(self, name)

    @property
    def path(self) -> str:
        """Dotted name of the module that will hold the factors."""
        return self.module

    def tried(self, model: nn.Module) -> Member | str:
        """Return the target as it may really be used, or why it may not, where that takes work."""
        return self

    @abstractmethod
    def entry(self, layer: LayerPlan, *, biased: bool) -> Entry:
        """Return what a checkpoint says of the matrix once it is replaced as planned."""

    def assemble(self, group: Sequence[Member], modules: Mapping[str, nn.Module]) -> nn.Module:
        """Return the module that holds all targets of a module, given each target's by name."""
        return modules[self.name]

    @abstractmethod
    def describe(
        self, model: nn.Module, group: Sequence[Member], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return what a checkpoint says of the module, and of others that share its weight.

        Args:
            model: still dense there.
            group: all targets of the module.
            entries: what it says of each target, by name.

        Returns:
            Entries by module name, and tied parameters (name to the name it shares).
        """

    def install(
        self, model: nn.Module, swap: Swap, module: nn.Module, entries: Mapping[str, Entry]
    ) -> None:
        """Put the module that holds the factors, described by its entry, into the model."""
        old: Any = model.get_submodule(self.module)
        module.requires_grad_(old.weight.requires_grad)  # what was frozen stays so
        swap.replace(self.module, module.train(old.training))


@dataclass(frozen=True)
class Finder:
    """Finds targets of one kind that take the place of several matrices.

    Attributes:
        name: of the kind.
        find: takes the model and the matrices chosen.
        usable: takes the model and what was found, and returns those that may really be used,
            where finding out takes work.
    """

    name: str
    find: Callable[[nn.Module, Sequence[Target]], Sequence[Target]]
    usable: Callable[[nn.Module, Sequence[Any]], Sequence[Target]] = lambda model, found: found
