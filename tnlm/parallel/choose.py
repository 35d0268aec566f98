"""The workers that a caller means."""

from __future__ import annotations

from concurrent.futures import Executor

from tnlm.errors import OptionError
from tnlm.parallel.pool import Pool
from tnlm.parallel.ranks import Ranks, count
from tnlm.parallel.workers import Workers

RANKS = "ranks"


def workers_of(given: Workers | Executor | str | None) -> Workers:
    """Return the workers for an argument.

    Args:
        given: workers; an executor; ``"ranks"`` for the processes of torch.distributed; None for
            this process alone.

    Raises:
        OptionError: if it is anything else, or this process was not started as one of several.
        ProcessError: if the processes cannot meet.

    Example:
        >>> workers_of(None).size
        1
    """
    if given is None or isinstance(given, Workers):
        return Workers() if given is None else given
    if given == RANKS:
        if count() > 0:
            return Ranks() if count() > 1 else Workers()
        raise OptionError(
            "workers='ranks', but this process was not started as one of several; start it with "
            "torchrun",
            argument="workers",
        )
    if isinstance(given, type):
        raise OptionError(
            f"workers={given.__name__} is a class; give an instance of it", argument="workers"
        )
    if isinstance(given, Executor) or hasattr(given, "submit"):
        return Pool(given)  # type: ignore[arg-type]  # dask's has the methods alone
    raise OptionError(
        f"workers={given!r}; allowed: 'ranks', or a concurrent.futures.Executor",
        argument="workers",
    )
