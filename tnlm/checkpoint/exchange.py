"""Writes directories completely or not at all, even if interrupted at any point.

A new directory is written beside its place, in ``.<name>.tnlm-save/part``, which is then renamed.
An existing directory stays in place, since it may be a mount point or lie in a read-only folder:
the files are written into ``.tnlm-save/part`` inside it, and exchanged in steps of one rename each:

1. ``part`` is complete and becomes ``new``;
2. the old files move to ``old``, the config first;
3. ``new`` becomes ``next``: from here on, the new files win;
4. they move out of ``next``, the config last;
5. ``old``, then ``next``, then the folder itself is removed.

The next save or load sees from the folder names how far an interrupted one got: with ``next`` it
continues at step 4; with ``old`` alone it moves the old files back. A lock in the folder, which
dies with its process, protects the files of a living process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from tnlm.errors import CheckpointError, TnlmError
from tnlm.utils.files import check_names
from tnlm.utils.folders import share, sync, sync_folder
from tnlm.utils.lock import Lock
from tnlm.utils.undo import attempt, signals_held

logger = logging.getLogger("tnlm")

WORK, LOCK = ".tnlm-save", "lock"
CONFIG = "config.json"
OF_THE_SYSTEM = "lost+found"
"""A folder at the root of some file systems, which users may not remove."""


def replace_directory(
    directory: Path, write: Callable[[Path], None], *, overwrite: bool = False
) -> None:
    """Write a directory completely or not at all.

    A failure at any point leaves only the old files, or only the new ones if they were already
    being moved into place. If the process is killed, the next call of this function or of
    :func:`recover` ensures this.

    Args:
        directory: new or empty, unless ``overwrite``; a link to a directory stays a link.
        write: fills an empty directory.
        overwrite: replace the contents of the directory.

    Raises:
        CheckpointError: if the directory is not empty or cannot be written, or another process is
            writing it.

    Example:
        >>> place = Path(tempfile.mkdtemp()) / "model"
        >>> replace_directory(place, lambda new: (new / "config.json").touch())
        >>> [path.name for path in place.iterdir()]
        ['config.json']
    """
    check_writable(directory, overwrite=overwrite)
    exchange = _Exchange(Path(os.path.realpath(directory)))
    try:
        attempt(lambda: exchange.run(write, overwrite), exchange.end)
    except Exception as error:
        if isinstance(error, TnlmError) or not _from_the_disk(error):
            raise
        raise CheckpointError(f"cannot write {directory}: {error}; {exchange.outcome}") from error


def check_writable(directory: Path, *, overwrite: bool = False) -> None:
    """Raise `CheckpointError` unless a directory can be created or written into.

    The leftovers of an interrupted save are cleaned up first.

    Example:
        >>> check_writable(Path("a-new-directory"))
    """
    check_names(directory, _beside(directory))
    if directory.is_symlink() and not directory.exists():
        raise CheckpointError(
            f"{directory} is a link to {directory.readlink()}, which does not exist"
        )
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; name a directory")
    writer = recover(directory)
    if writer is not None:
        raise CheckpointError(f"{writer} is writing {directory}; wait until it is done")
    if directory.is_dir():
        found = list(_entries(directory))
        if found and not overwrite:
            raise CheckpointError(
                f"{directory} is not empty; choose another, or pass overwrite=True",
                argument="overwrite",
            )
        for path in filter(os.path.ismount, found):
            raise CheckpointError(f"{path} is a mount point, which cannot be replaced")
    check_place(directory)


def check_place(directory: Path) -> None:
    """Raise `CheckpointError` unless a directory can be created, or files created in it.

    Example:
        >>> check_place(Path("a-new-directory"))
    """
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{directory} cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{directory} cannot be written: no permission in {parent}")
    try:  # also finds read-only file systems and immutable folders
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error


def recover(directory: Path) -> str | None:
    """Clean up after interrupted saves of a directory, in it and beside it.

    Returns:
        The name of another process that is writing the directory now, or None.

    Raises:
        CheckpointError: if files of an interrupted save cannot be moved into place.
    """
    target = Path(os.path.realpath(directory))
    for work in (target / WORK, _beside(target)):
        lock = Lock(work / LOCK)
        try:
            if not work.is_dir():
                continue
            if not lock.take():
                return lock.holder()
            if _settle(work, target):
                logger.warning("%s was restored after an interrupted save", directory)
        except OSError as error:
            if (work / "next").is_dir() or (work / "old").is_dir():
                raise CheckpointError(
                    f"a save of {directory} was interrupted, and the files in {work} cannot be "
                    f"moved into place: {error}"
                ) from error
            logger.warning("the leftovers of an interrupted save in %s cannot be removed", work)
        finally:
            lock.close()
    return None


class _Exchange:
    """One write of a directory by this process."""

    def __init__(self, target: Path) -> None:
        self.outcome = "nothing was changed there"
        self._target = target
        parents = [target.parent, *target.parent.parents]
        self._made = [path for path in parents if not path.exists()]
        self._lock = self._choose()

    def run(self, write: Callable[[Path], None], overwrite: bool) -> None:
        """Write the files, and move them into place."""
        self._open()
        work = self._lock.path.parent
        part, inside = work / "part", work.parent == self._target
        part.mkdir()
        write(part)
        share(part, self._lock.path)
        sync(part)
        if not inside:
            part.replace(self._target)
            sync_folder(self._target.parent)
        else:
            if not overwrite and any(_entries(self._target)):
                raise CheckpointError(
                    f"{self._target} is no longer empty; nothing was changed there"
                )
            self._swap(work)
        self.end()

    def _swap(self, work: Path) -> None:
        (work / "part").replace(work / "new")
        (work / "old").mkdir()
        _move(work / "old", _config_first(_entries(self._target)))
        (work / "new").replace(work / "next")
        self.outcome = "the new files are in place"
        sync_folder(work)
        _settle(work, self._target)

    def end(self) -> None:
        """Complete or undo the exchange, and release the lock."""
        work = self._lock.path.parent
        try:
            if self._lock.stands():
                _settle(work, self._target)
        finally:
            self._lock.close()
        recover(self._target)  # in case the above was interrupted, or ran before the lock
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def _choose(self) -> Lock:
        inside = self._target.is_dir()
        return Lock((self._target / WORK if inside else _beside(self._target)) / LOCK)

    def _open(self) -> None:
        """Create and lock the folder into which this process writes."""
        while True:
            self._lock = self._choose()
            work = self._lock.path.parent
            try:
                work.mkdir(parents=True, exist_ok=True)
                taken = self._lock.take()
            except FileNotFoundError:  # another process has just finished and removed it
                continue
            if not taken:
                raise CheckpointError(
                    f"{self._lock.holder()} is writing {self._target}; wait until it is done"
                )
            if self._choose().path == self._lock.path:
                return
            self.end()  # the directory was created or removed meanwhile


@signals_held()
def _settle(work: Path, target: Path) -> bool:
    """Complete an exchange or roll it back; return whether files had to move."""
    moved = False
    if (work / "next").is_dir():
        moved = _move(target, reversed(_config_first((work / "next").iterdir())))
        sync_folder(target)
    elif (work / "old").is_dir():
        moved = _move(target, reversed(_config_first((work / "old").iterdir())))
    # "next" marks the new files as the right ones, so it is removed last.
    for name in ("part", "new", "old", "next"):
        shutil.rmtree(work / name, ignore_errors=True)
        if (work / name).exists():
            logger.warning("%s holds files of a finished save; they can be removed", work)
            return moved
    (work / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another process uses it
        work.rmdir()
    return moved


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}{WORK}"


def _entries(directory: Path) -> Iterator[Path]:
    """Yield the contents of a directory, without the folders of tnlm and the system."""
    return (p for p in directory.iterdir() if p.name not in (WORK, OF_THE_SYSTEM))


def _config_first(paths: Iterable[Path]) -> list[Path]:
    """Sort the config first, so that a directory with only some of its files cannot be loaded."""
    return sorted(paths, key=lambda path: (path.name != CONFIG, path.name))


def _move(place: Path, paths: Iterable[Path]) -> bool:
    """Move files and folders into a folder; return whether there were any."""
    moved = False
    for path in paths:
        path.replace(place / path.name)
        moved = True
    return moved


def _from_the_disk(error: Exception) -> bool:
    """Return whether an error is about writing files; tokenizers raises plain exceptions."""
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)
