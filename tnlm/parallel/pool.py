"""Workers that are the processes or threads of an executor."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future

from tqdm.auto import tqdm

from tnlm.errors import ProcessError
from tnlm.parallel.workers import Item, Result, Size, Workers


class Pool(Workers):
    """Gives tasks that need nothing of this process to an executor.

    Args:
        executor: any with the interface of ``concurrent.futures.Executor``.
        ahead: how many tasks are handed over before their results are taken; their inputs are all
            in memory. By default twice the number of cores.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from functools import partial
        >>> with ThreadPoolExecutor(2) as executor:
        ...     found = Pool(executor).map(abs, [-1, 2], lambda item: Size(1.0, str(item)),
        ...                                portable=lambda item: partial(abs, item))
        ...     list(found)
        [1, 2]
    """

    def __init__(self, executor: Executor, ahead: int | None = None) -> None:
        """Hold the executor; see the class for the arguments."""
        self._executor = executor
        self._ahead = ahead or 2 * (os.cpu_count() or 1)

    def map(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
        size: Callable[[Item], Size],
        *,
        portable: Callable[[Item], Callable[[], Result]] | None = None,
        title: str | None = None,
    ) -> Iterator[Result]:
        """Yield the result of every item, in order.

        Raises:
            ProcessError: if the executor stops, or was shut down.
        """
        if portable is None:
            yield from super().map(work, items, size, title=title)
            return
        waiting: deque[Future[bytes]] = deque()
        left = iter(items)
        try:
            for _ in tqdm(items, desc=title, unit="matrix", disable=title is None):
                for item in left:
                    waiting.append(self._submit(pickle.dumps(portable(item))))
                    if len(waiting) >= self._ahead:
                        break
                yield pickle.loads(waiting.popleft().result())
        except BrokenExecutor as error:
            raise ProcessError(f"a process of the executor stopped: {error}") from error
        finally:
            for future in waiting:
                future.cancel()

    def _submit(self, call: bytes) -> Future[bytes]:
        try:
            return self._executor.submit(_run, call)
        except BrokenExecutor:
            raise
        except RuntimeError as error:
            raise ProcessError(
                f"the executor takes no tasks ({error}); give one that runs"
            ) from error


def _run(call: bytes) -> bytes:
    """Return the pickled result of a pickled call.

    Both are bytes because executors differ in how they pass tensors on, some by shared memory.
    """
    return pickle.dumps(pickle.loads(call)())
