"""The contract of a gatherer: what is learned from data in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.calibration.store import Statistics
from tnlm.compression.choices import Calibration
from tnlm.targets.base import Member


@dataclass(frozen=True)
class Task:
    """What is to be gathered.

    Attributes:
        model: the dense model.
        targets: the matrices.
        batches: calibration sequences.
        lessons: training sequences.
        tokens: how many tokens anything is trained on.
        data: where the sequences are from.
        progress: show progress bars.
    """

    model: PreTrainedModel
    targets: Sequence[Member]
    batches: Sequence[Batch]
    lessons: Sequence[Batch]
    tokens: int
    data: Calibration
    progress: bool

    @property
    def modules(self) -> list[str]:
        """Names of the modules that hold the matrices, each once."""
        return list(dict.fromkeys(target.module for target in self.targets))

    @property
    def few(self) -> Sequence[Batch]:
        """The sequences that gradients are taken of."""
        return self.batches[: self.data.cut.gradient_samples]


@dataclass(frozen=True)
class Found:
    """What was gathered.

    Attributes:
        read: returns a statistic of a target's module, by name.
        store: holds the statistics, where they are kept by module; of modules that no token
            reaches it has none.
        model: the one whose weights are fitted, if it is another now.
    """

    read: Callable[[Member, str], Tensor]
    store: Statistics | None = None
    model: PreTrainedModel | None = None


def by_module(store: Statistics) -> Found:
    """Return statistics that are kept by module."""
    return Found(lambda target, name: store.tensor(target.module, name), store)


@dataclass(frozen=True)
class Gatherer:
    """A way to learn from data.

    Attributes:
        name: the kind of statistics, as metrics name it among their needs.
        statistics: names of what is gathered.
        gather: does it; further arguments are the metric's own ``gathering``.
        first: whether it changes what all others look at, and so runs before them.
    """

    name: str
    statistics: tuple[str, ...]
    gather: Callable[..., Found]
    first: bool = False

    def __call__(self, task: Task, **options: Any) -> Found:
        """Gather."""
        return self.gather(task, **options)
