"""The interface of allocations, which split a budget across matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from tnlm.allocation.clock import Clock
from tnlm.decompositions.base import Format
from tnlm.metrics.metric import Metric
from tnlm.parallel.workers import ALONE, Workers
from tnlm.plans.plan import LayerPlan
from tnlm.precision.grid import Precision
from tnlm.targets.base import Target
from tnlm.targets.effort import size_of
from tnlm.tensors.network import Cost, Network
from tnlm.utils.residency import resident

Found = TypeVar("Found")


@dataclass(frozen=True)
class Limits:
    """Limits on the cost of the matrices, or on their errors.

    Attributes:
        keep: fraction of the targets' cost to keep, in the unit.
        tolerance: relative error allowed in the metric; ``keep`` then does not apply.
        max_macs: most multiply-adds per matrix, as a multiple of dense.
        options: options of the formats, fixed by the user or the scheme.
        unit: unit of ``keep``: ``"params"``, ``"bytes"``, ``"macs"`` or ``"time"``.
        blocks: how many last blocks to compress, for allocations that take it.
        clock: predicts times, if they are the unit.
    """

    keep: float
    tolerance: float | None = None
    max_macs: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "params"
    blocks: int | None = None
    clock: Clock | None = None

    def timed(self, cost: Cost, target: Target, network: Network | None = None) -> Cost:
        """Return a cost with its predicted time, if that is the unit of ``keep``."""
        return cost if self.clock is None else self.clock.timed(cost, target, network)

    def price(self, cost: Cost) -> int:
        """Return a cost in the unit of ``keep``."""
        price: int = getattr(cost, self.unit)
        return price


@dataclass(frozen=True)
class Problem:
    """The matrices to decide on, with metrics, importance and limits.

    Attributes:
        model: holds the weights.
        targets: the matrices.
        joint: targets that may replace several of these matrices together.
        formats: the formats to choose from.
        metric: returns the metric of a target.
        importance: returns how much a unit of a target's squared error affects the loss.
        adds_bias: whether targets without a bias get one.
        limits: the budget.
        predict: whether to compute errors even if no decision depends on them.
        progress: show a progress bar.
        grids: on which candidates may be stored; None for the model's dtype.
        workers: share out the work.
    """

    model: nn.Module
    targets: Sequence[Target]
    formats: Sequence[Format[Any]]
    metric: Callable[[Target], Metric]
    importance: Callable[[Target], float]
    limits: Limits
    joint: Sequence[Target] = ()
    adds_bias: bool = False
    predict: bool = False
    progress: bool = False
    grids: Sequence[Precision | None] = (None,)
    workers: Workers = ALONE

    @property
    def replaced(self) -> dict[str, Target]:
        """The joint target that could replace a target, by the target's name."""
        taken = {member.name: unit for unit in self.joint for member in unit.members}
        places = [(target, taken.get(target.members[0].name)) for target in self.targets]
        return {target.name: unit for target, unit in places if unit is not None}

    def map(
        self, work: Callable[[Target, Tensor, Metric], Found]
    ) -> Iterator[tuple[Target, Found]]:
        """Yield every target with what is found from it, its weight and its metric."""

        def of(target: Target) -> Found:
            with resident(self.model, *(member.module for member in target.members)):
                return work(target, target.weight(self.model), self.metric(target))

        everything = [*self.targets, *self.joint]
        title = "planning" if self.progress else None
        found = self.workers.map(of, everything, size_of, title=title)
        yield from zip(everything, found, strict=True)

    def extra(self, target: Target) -> int:
        """Return the size of the bias added to a target, or 0."""
        return target.added_bias(self.model) if self.adds_bias else 0


class Allocation(ABC):
    """A way to split a budget across matrices.

    Attributes:
        name: the name that users write as ``allocation=``.
        title: one line for tables.
        weighs_loss: whether it needs the effect of each matrix on the loss.
        units: the units of the budget that it supports.
        tolerates: whether it supports a tolerance instead of a budget.
        counts_blocks: whether it takes the number of blocks to compress.
        formats: names of the formats that it supports; None for all.
        metric: the one metric that it needs; None for any.
        takes_sizes: whether options may set the size of every matrix.
        limits_macs: whether it can keep multiply-adds below the dense ones.
        chooses_bits: whether it counts and chooses the bits of codes.
        repeats: keywords of the call that a plan is carried out with again, where fits need them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    weighs_loss: ClassVar[bool] = False
    units: ClassVar[tuple[str, ...]] = ("params", "bytes", "macs")
    tolerates: ClassVar[bool] = False
    counts_blocks: ClassVar[bool] = False
    formats: ClassVar[frozenset[str] | None] = None
    metric: ClassVar[str | None] = None
    takes_sizes: ClassVar[bool] = True
    limits_macs: ClassVar[bool] = True
    chooses_bits: ClassVar[bool] = False
    repeats: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Decide for every target, in order.

        Raises:
            BudgetError: if no plan can meet the budget; the message states the smallest possible.
        """
