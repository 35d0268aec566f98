"""The contract of an allocation: how a budget is shared out between matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from tqdm.auto import tqdm

from tnlm.decompositions.base import Format
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Target
from tnlm.tensors.network import Cost


@dataclass(frozen=True)
class Limits:
    """What the matrices may cost, or how large their errors may be.

    Attributes:
        keep: fraction of the targets' cost, in the unit.
        tolerance: relative error in the metric; then ``keep`` does not bind.
        max_macs: multiply-adds per token, as a multiple of the dense matrix's.
        options: the formats' options that the user or the scheme fixes.
        unit: what ``keep`` counts: ``"params"``, ``"bytes"`` or ``"macs"``.
        blocks: how many of the last blocks are compressed; for an allocation that asks.
    """

    keep: float
    tolerance: float | None = None
    max_macs: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "params"
    blocks: int | None = None

    def price(self, cost: Cost) -> int:
        """Return the part of a cost that ``keep`` counts."""
        price: int = getattr(cost, self.unit)
        return price


@dataclass(frozen=True)
class Problem:
    """Matrices to decide on, and what is known about them.

    Attributes:
        model: holds the weights.
        targets: the matrices.
        joint: targets that stand for several of these matrices, and may take their place.
        formats: the structures that each may take.
        metric: how the error of a target is measured.
        importance: effect on the loss of a unit of a target's squared error in its metric.
        adds_bias: whether a target without a bias gets one.
        limits: the budget.
        predict: compute errors even where nothing depends on them.
        progress: show a progress bar.
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

    @property
    def replaced(self) -> dict[str, Target]:
        """The joint target that could take a target's place, by the target's name."""
        return {member.name: unit for unit in self.joint for member in unit.members}

    def each(self) -> Iterator[tuple[Target, Tensor, Metric]]:
        """Yield every target with its weight and metric, under a progress bar."""
        everything = [*self.targets, *self.joint]
        for target in tqdm(everything, desc="planning", unit="matrix", disable=not self.progress):
            yield target, target.weight(self.model), self.metric(target)

    def extra(self, target: Target) -> int:
        """Return the size of the bias that is added to a target, 0 if none is."""
        return target.added_bias(self.model) if self.adds_bias else 0


class Allocation(ABC):
    """A way to share out a budget.

    Attributes:
        name: what users write as ``allocation=``.
        title: one line for tables.
        weighs_loss: whether it needs to know the effect of each matrix on the loss.
        units: what its budget can count.
        tolerates: whether it can work to a tolerance in place of a budget.
        counts_blocks: whether it asks how many blocks to cut.
        formats: names of the formats it can share a budget between; None for all.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    weighs_loss: ClassVar[bool] = False
    units: ClassVar[tuple[str, ...]] = ("params", "bytes", "macs")
    tolerates: ClassVar[bool] = False
    counts_blocks: ClassVar[bool] = False
    formats: ClassVar[frozenset[str] | None] = None

    @abstractmethod
    def allocate(self, problem: Problem) -> list[LayerPlan]:
        """Decide for every target, in order.

        Raises:
            BudgetError: if no plan can meet the budget; says the smallest possible.
        """
