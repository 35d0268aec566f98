"""Gives the files of a new folder their permissions, and flushes them to disk."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def share(folder: Path, ordinary: Path) -> None:
    """Give files the permissions of an ordinary new file: safetensors hides its own from others.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> hidden, ordinary = folder / "hidden", folder / "ordinary"
        >>> hidden.touch(0o600), ordinary.touch()
        (None, None)
        >>> share(folder, ordinary)
        >>> hidden.stat().st_mode == ordinary.stat().st_mode
        True
    """
    mode = ordinary.stat().st_mode & 0o777
    for path in _files(folder):
        with contextlib.suppress(OSError):  # some file systems have no permissions
            path.chmod(mode)


def sync(folder: Path) -> None:
    """Flush all files below a folder to disk, in case the machine fails."""
    for path in _files(folder):
        handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names of a folder's files to disk, on systems that can."""
    with contextlib.suppress(OSError, AttributeError):  # some systems cannot sync folders
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
