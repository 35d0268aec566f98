"""Folders for work in progress, recognised as abandoned once their process is gone."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tnlm.utils.lock import Lock
from tnlm.utils.undo import signals_held

logger = logging.getLogger("tnlm")

PREFIX = ".tnlm-work-"


class Claim:
    """A uniquely named folder, locked by this process.

    Making one removes its siblings whose processes are gone.

    Args:
        parent: an existing folder.

    Raises:
        OSError: if no folder can be made there.

    Example:
        >>> claim = Claim(Path(tempfile.mkdtemp()))
        >>> (claim.folder / "file").touch()
        >>> claim.drop()
        >>> claim.folder.exists()
        False
    """

    def __init__(self, parent: Path) -> None:
        """Make and lock a folder."""
        sweep(parent)
        self._made: list[Path] = []
        self._locks: list[Lock] = []
        weakref.finalize(self, _remove, self._made, self._locks)  # in case nobody drops it
        while True:
            self._made.append(parent / f"{PREFIX}{uuid.uuid4().hex[:12]}")
            self._locks.append(Lock(self.folder / "lock"))
            self.folder.mkdir()
            try:
                if self.lock.take():
                    return
            except FileNotFoundError:  # another process has just swept it
                continue

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._made[-1]

    @property
    def lock(self) -> Lock:
        """The lock that keeps others from removing the folder."""
        return self._locks[-1]

    def drop(self) -> None:
        """Remove the folder, unless it was renamed."""
        _remove(self._made, self._locks)


@signals_held()  # Python's rmtree closes files twice if it is interrupted
def _remove(made: list[Path], locks: list[Lock]) -> None:
    for lock in locks:
        lock.close()
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the claims of processes that are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        lock = Lock(folder / "lock")
        try:
            if folder.is_dir() and lock.take():
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            logger.info("%s cannot be removed: %s", folder, error)
        finally:
            lock.close()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder in the temporary directory; what a killed process leaves is swept later.

    Example:
        >>> with temporary_folder() as folder:
        ...     folder.is_dir()
        True
    """
    claim = Claim(Path(tempfile.gettempdir()))
    try:
        inner = claim.folder / "files"
        inner.mkdir()
        yield inner
    finally:
        claim.drop()
