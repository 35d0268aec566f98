"""Workers that are ranks of torch.distributed, which all run the same program."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from tnlm.errors import ProcessError
from tnlm.parallel.packing import pack
from tnlm.parallel.workers import Item, Result, Size, Workers

PATIENCE = timedelta(minutes=5)
"""How long processes wait for each other at the start."""
ALWAYS = timedelta(days=30)
"""How long they wait during the work; one that ends closes its connections, which ends the wait."""


def are_given() -> bool:
    """Return whether this process was started as one of several, for example by ``torchrun``."""
    return count() > 1


def count() -> int:
    """Return the number of processes that were started together; 0 if nothing says so.

    Example:
        >>> count()
        0
    """
    if dist.is_initialized():
        return dist.get_world_size()
    given = os.environ.get("WORLD_SIZE", "0")
    try:
        return int(given)
    except ValueError:
        raise ProcessError(f"WORLD_SIZE={given} is no number of processes") from None


class Ranks(Workers):
    """Shares work out to all ranks of torch.distributed; every rank gets all results.

    All ranks must make the same calls. Used as a context: a rank that leaves it with an error ends
    the work of all. It may be used again, also within itself.

    Raises:
        ProcessError: if the ranks cannot meet.
    """

    def __init__(self) -> None:
        """Join the other processes."""
        if not dist.is_initialized():
            _join()  # for the life of the process, since its store cannot be joined twice
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._groups: list[Any] = []

    def __enter__(self) -> Self:
        """Connect the processes."""
        self._groups.append(dist.new_group(backend="gloo", timeout=ALWAYS))
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Leave the other processes, and say why if it is because of an error."""
        if error is not None and not isinstance(error, ProcessError):
            reason = f"process {self.rank} of {self.size} stopped: {_in_words(error)}"
            dist.distributed_c10d._get_default_store().set(self._reason, reason)
        dist.destroy_process_group(self._groups.pop())

    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        size: Callable[[Item], Size],
        *,
        portable: Callable[[Item], Callable[[], Result]] | None = None,
        title: str | None = None,
    ) -> Iterator[Result]:
        """Yield the result of every item, in order, in every process."""
        sizes = [size(item) for item in items]
        owners = pack([one.cost for one in sizes], [one.group for one in sizes], self.size)
        own = [item for item, owner in zip(items, owners, strict=True) if owner == self.rank]
        title = title if self.rank == 0 else None
        with tempfile.TemporaryFile(prefix="tnlm-") as file:  # results are as large as the model
            results = super().map(work, own, size, title=title)
            lengths = [file.write(pickle.dumps(result)) for result in results]
            file.seek(0)
            left = [iter(found) for found in self.gather(lengths)]
            for owner in owners:
                length = next(left[owner])
                mine = file.read(length) if owner == self.rank else None
                yield pickle.loads(self._send(mine, owner, length))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        found: list[Any] = [None] * self.size
        self._together(dist.all_gather_object, found, value)
        return found

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of those of all processes."""
        total = tensor.cpu()
        self._together(dist.all_reduce, total)
        tensor.copy_(total)

    def _send(self, data: bytes | None, owner: int, length: int) -> bytes:
        """Return the bytes that one process has."""
        if data is None:
            held = torch.empty(length, dtype=torch.uint8)
        else:
            held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._together(dist.broadcast, held, owner)
        return held.numpy().tobytes() if data is None else data

    def _together(self, operation: Callable[..., Any], *args: Any) -> None:
        """Run an operation of all processes.

        Raises:
            ProcessError: if another process has stopped, or outside of the context.
        """
        if not self._groups:
            raise ProcessError("the processes are not connected; use `with Ranks() as workers:`")
        try:
            operation(*args, group=self._groups[-1])
        except RuntimeError as error:
            raise ProcessError(self._why()) from error

    @property
    def _reason(self) -> str:
        """The key under which a process that fails says why."""
        return f"tnlm/{self._groups[-1].group_name}"

    def _why(self) -> str:
        """Return why another process has stopped, as far as it could say."""
        unknown = "another process has stopped or cannot be reached; its own output may say why"
        try:
            store = dist.distributed_c10d._get_default_store()
            return store.get(self._reason).decode() if store.check([self._reason]) else unknown
        except RuntimeError:
            return unknown  # the process with the store is the one that has stopped


def _join() -> None:
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        raise ProcessError(
            f"the processes cannot meet ({given}): {_in_words(error)}; start all of them with "
            "torchrun, and check that each can reach the first one"
        ) from error


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
