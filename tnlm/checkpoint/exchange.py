"""Directories that are written whole or not at all, wherever an interruption comes.

Where nothing stands yet, the files are written beside, in ``.<name>.tnlm-save/part``, which then
gets the directory's name. Where a directory stands, it keeps its place, as it may be a mount point
or stand in a folder that cannot be written: the files are written into ``.tnlm-save/part`` inside
it, and exchanged in steps, each of which is one renaming:

1. ``part`` is complete and becomes ``new``;
2. the old files move to ``old``, the config first;
3. ``new`` becomes ``next``: from here on the new files are what will stand;
4. they move out of ``next``, the config last;
5. ``old``, then ``next``, then the folder itself is removed.

Whoever comes next, be it a save or a load, finds by the names of the folders how far it came: with
``next`` it goes on from step 4, with ``old`` alone it moves back what is there. A lock in the
folder, which dies with its process, keeps it from touching what a living process writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from tnlm.errors import CheckpointError, TnlmError
from tnlm.utils.files import check_names
from tnlm.utils.lock import Lock
from tnlm.utils.undo import attempt, signals_held

logger = logging.getLogger("tnlm")

WORK, LOCK = ".tnlm-save", "lock"
CONFIG = "config.json"
OF_THE_SYSTEM = "lost+found"
"""A folder that some file systems hold at their top, which no user may remove."""


def replace_directory(
    directory: Path, write: Callable[[Path], None], *, overwrite: bool = False
) -> None:
    """Write a directory, all of it or nothing.

    A failure at any point leaves what stood there, or, if the new files were on their way to their
    place, the new; nothing else stays. If the process is killed, the next call of this function or
    of :func:`recover` sees to that.

    Args:
        directory: new or empty, unless ``overwrite``; a link to a directory stays one.
        write: fills an empty directory.
        overwrite: replace what the directory holds.

    Raises:
        CheckpointError: if the directory is not empty or cannot be written, or another process
            writes it.

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
    """Raise `CheckpointError` unless a directory can be made, or written into, as it stands.

    What an interrupted save left there is put in order first.

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
    """Raise `CheckpointError` unless files can be made in a directory, or it can be made.

    Example:
        >>> check_place(Path("a-new-directory"))
    """
    parent = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{directory} cannot be written: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{directory} cannot be written: no permission in {parent}")
    try:  # tells more: file systems that cannot be written, folders that may not change
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from error


def recover(directory: Path) -> str | None:
    """Put in order what interrupted saves of a directory left there or beside it.

    Returns:
        Who is writing the directory now, if another process is.

    Raises:
        CheckpointError: if files of an interrupted save cannot be moved to where they belong.
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
                logger.warning("%s was put in order after a save that was interrupted", directory)
        except OSError as error:
            if (work / "next").is_dir() or (work / "old").is_dir():
                raise CheckpointError(
                    f"a save of {directory} was interrupted, and the files in {work} cannot be "
                    f"moved to their place: {error}"
                ) from error
            logger.warning("what an interrupted save left in %s cannot be removed", work)
        finally:
            lock.close()
    return None


class _Exchange:
    """One process's writing of a directory."""

    def __init__(self, target: Path) -> None:
        self.outcome = "nothing was changed there"
        self._target = target
        parents = [target.parent, *target.parent.parents]
        self._made = [path for path in parents if not path.exists()]
        self._lock = self._choose()

    def run(self, write: Callable[[Path], None], overwrite: bool) -> None:
        """Write the files, and bring them to their place."""
        self._open()
        work = self._lock.path.parent
        part, inside = work / "part", work.parent == self._target
        part.mkdir()
        write(part)
        _sync(part)
        if not inside:
            part.replace(self._target)
            _sync_folder(self._target.parent)
        else:
            if not overwrite and any(_entries(self._target)):
                raise CheckpointError(
                    f"{self._target} was empty, and is not any more; nothing was changed there"
                )
            self._swap(work)
        self.end()

    def _swap(self, work: Path) -> None:
        (work / "part").replace(work / "new")
        (work / "old").mkdir()
        _move(work / "old", _config_first(_entries(self._target)))
        (work / "new").replace(work / "next")
        self.outcome = "the new files stand there"
        _sync_folder(work)
        _settle(work, self._target)

    def end(self) -> None:
        """Bring what was begun to its end, or undo it, and let others write."""
        work = self._lock.path.parent
        try:
            if self._lock.stands():
                _settle(work, self._target)
        finally:
            self._lock.close()
        recover(self._target)  # if the above was interrupted, or came before the lock
        for folder in self._made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def _choose(self) -> Lock:
        inside = self._target.is_dir()
        return Lock((self._target / WORK if inside else _beside(self._target)) / LOCK)

    def _open(self) -> None:
        """Make the folder in which this process writes, and lock it."""
        while True:
            self._lock = self._choose()
            work = self._lock.path.parent
            try:
                work.mkdir(parents=True, exist_ok=True)
                taken = self._lock.take()
            except FileNotFoundError:  # another has just ended, and removed it
                continue
            if not taken:
                raise CheckpointError(
                    f"{self._lock.holder()} is writing {self._target}; wait until it is done"
                )
            if self._choose().path == self._lock.path:
                return
            self.end()  # the directory has come or gone since


@signals_held()
def _settle(work: Path, target: Path) -> bool:
    """Bring an exchange to its end, or back to its start; return whether files had to move."""
    moved = False
    if (work / "next").is_dir():
        moved = _move(target, reversed(_config_first((work / "next").iterdir())))
        _sync_folder(target)
    elif (work / "old").is_dir():
        moved = _move(target, reversed(_config_first((work / "old").iterdir())))
    # "next" says which files are the right ones, and goes last.
    for name in ("part", "new", "old", "next"):
        shutil.rmtree(work / name, ignore_errors=True)
        if (work / name).exists():
            logger.warning("%s holds files of a save that is over; they can be removed", work)
            return moved
    (work / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another has come
        work.rmdir()
    return moved


def _beside(target: Path) -> Path:
    return target.parent / f".{target.name}{WORK}"


def _entries(directory: Path) -> Iterator[Path]:
    """Yield what a directory holds, but for what is no content."""
    return (p for p in directory.iterdir() if p.name not in (WORK, OF_THE_SYSTEM))


def _config_first(paths: Iterable[Path]) -> list[Path]:
    """Sort so that a directory with some of its files has no config, and cannot be loaded."""
    return sorted(paths, key=lambda path: (path.name != CONFIG, path.name))


def _move(place: Path, paths: Iterable[Path]) -> bool:
    """Move files and folders to a place; return whether there were any."""
    moved = False
    for path in paths:
        path.replace(place / path.name)
        moved = True
    return moved


def _sync(folder: Path) -> None:
    """See that all files below a folder are on the disk, should the machine fail."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError, AttributeError):  # some systems cannot sync folders
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _from_the_disk(error: Exception) -> bool:
    """Whether an error is of writing files; tokenizers raises these as plain exceptions."""
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)
