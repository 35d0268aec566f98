"""The interface of gatherers, which collect statistics from data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.store import Statistics
from tnlm.compression.choices import Calibration
from tnlm.compression.request import Request
from tnlm.parallel.workers import ALONE, Workers
from tnlm.targets.base import Member


@dataclass(frozen=True)
class Task:
    """The input of a gatherer.

    Attributes:
        model: the dense model.
        targets: the matrices.
        batches: calibration sequences.
        lessons: training sequences.
        tokens: how many tokens to train on.
        data: the calibration data, and how it is cut.
        progress: show progress bars.
        request: the request.
        workers: share out the batches.
        earlier: the outputs of earlier gatherers, by name.
    """

    model: PreTrainedModel
    targets: Sequence[Member]
    batches: Sequence[Batch]
    lessons: Sequence[Batch]
    tokens: int
    data: Calibration
    progress: bool
    request: Request
    workers: Workers = ALONE
    earlier: Mapping[str, Found] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """Names of the modules that hold the matrices, each once."""
        return list(dict.fromkeys(target.module for target in self.targets))

    @property
    def few(self) -> Sequence[Batch]:
        """The sequences for gradients."""
        return self.batches[: self.data.cut.gradient_samples]


@dataclass(frozen=True)
class Found:
    """The output of a gatherer.

    Attributes:
        read: returns a statistic of a target's module, by name.
        store: holds the statistics, if kept by module; it lacks modules that no token reaches.
        model: the model to fit instead of the original, if any.
    """

    read: Callable[[Member, str], Tensor]
    store: Statistics | None = None
    model: PreTrainedModel | None = None


def by_module(store: Statistics) -> Found:
    """Wrap statistics kept by module."""
    return Found(lambda target, name: store.tensor(target.module, name), store)


def from_gradients(task: Task, **options: Any) -> Found:
    """Gather statistics by `collect_gradients`, from the sequences for gradients."""
    return by_module(
        collect_gradients(
            task.model,
            task.modules,
            task.few,
            seed=task.data.cut.seed,
            cache_dir=task.data.cache_dir,
            progress=task.progress,
            workers=task.workers,
            **options,
        )
    )


@dataclass(frozen=True)
class Gatherer:
    """A way to gather statistics from data.

    Attributes:
        name: the kind of statistics, as metrics list it in ``needs``.
        statistics: the names of the statistics.
        gather: gathers them; its further arguments are the metric's ``gathering``.
        first: whether it changes the model for the others, and so runs before them.
    """

    name: str
    statistics: tuple[str, ...]
    gather: Callable[..., Found]
    first: bool = False

    def __call__(self, task: Task, **options: Any) -> Found:
        """Gather the statistics."""
        return self.gather(task, **options)
