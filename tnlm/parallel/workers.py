"""The interface of workers, which share out the work of a call; here, one process does all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from torch import Tensor
from tqdm.auto import tqdm

from tnlm.errors import ProcessError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Size:
    """How large a task is, and which tasks stay together.

    Attributes:
        cost: predicted time, in any unit.
        group: tasks of one group are done by one process, one after the other.
    """

    cost: float
    group: str


class Workers:
    """Does all work in this process; subclasses share it out.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes that run the same program.

    Example:
        >>> list(Workers().map(abs, [-1, 2], lambda item: Size(1.0, str(item))))
        [1, 2]
    """

    rank = 0
    size = 1

    def __enter__(self) -> Self:
        """Start sharing."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Stop sharing."""

    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        size: Callable[[Item], Size],
        *,
        portable: Callable[[Item], Callable[[], Result]] | None = None,
        title: str | None = None,
    ) -> Iterator[Result]:
        """Yield the result of every item, in order, in every process.

        Args:
            work: called with an item.
            items: the same in every process.
            size: returns how large the task of an item is.
            portable: returns the work on an item as a call that can be pickled and needs nothing
                of this process; without it, an executor is not used.
            title: title of the progress bar; None for no bar.
        """
        for item in tqdm(items, desc=title, unit="matrix", disable=title is None):
            yield work(item)

    def mine(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's share of some items."""
        return items[self.rank :: self.size]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        return [value]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of those of all processes."""

    def check_same(self, **facts: Any) -> None:
        """Raise `ProcessError` unless all processes give the same facts."""
        _check_same(self.gather(facts))


ALONE = Workers()
"""This process alone."""


def _check_same(found: Sequence[Mapping[str, Any]]) -> None:
    for rank, facts in enumerate(found):
        for name, value in facts.items():
            if repr(value) != repr(found[0][name]):  # arguments of a wrong type may not compare
                raise ProcessError(
                    f"process {rank} of {len(found)} has {name} {_short(value)}, but process 0 "
                    f"has {_short(found[0][name])}; start all processes with the same"
                )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
