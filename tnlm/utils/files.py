"""Writes single files completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from tnlm.errors import CheckpointError
from tnlm.utils.claim import Claim
from tnlm.utils.undo import attempt


def write_file(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically: elsewhere first, then moved into place.

    An existing file is replaced and keeps its permissions; a link to a file stays a link.

    Raises:
        OSError: if it cannot be written; an existing file is then unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes"
        >>> write_file(path, "whole")
        >>> path.read_text()
        'whole'
    """
    target = Path(os.path.realpath(path))
    claim = Claim(target.parent)

    def work() -> None:
        new = claim.folder / "new"
        with new.open("w", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # there is no old file, or no permissions here
                shutil.copymode(target, new)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(target)
        claim.drop()

    attempt(work, claim.drop)


def save_text(path: str | Path, text: str) -> None:
    """Write a text file that was asked for, completely or not at all.

    Raises:
        CheckpointError: if it cannot be written; an existing file is then unchanged.

    Example:
        >>> save_text("no-such-folder/plan.json", "{}")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such-folder/plan.json cannot be written: ...
    """
    try:
        if _is_device(Path(path)):
            Path(path).write_text(text, encoding="utf-8")
        else:
            write_file(Path(path), text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Raise `CheckpointError` unless a file can be created, or replaced.

    Example:
        >>> check_file(Path("a-new-file"))
        >>> check_file(Path("no-such-folder/file"))
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such-folder/file cannot be written: ...
    """
    check_names(path)
    if _is_device(path):
        return
    if path.is_dir():
        raise CheckpointError(f"{path} cannot be written: it is a directory")
    try:  # also finds read-only file systems
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def check_names(*paths: Path) -> None:
    """Raise `CheckpointError` for a path that the file system cannot represent.

    Example:
        >>> check_names(Path("no-such-file"))
        >>> check_names(Path("a" * 5000))
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: 'aaa...' cannot be written: ...
    """
    for path in paths:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{str(path)[:200]!r} cannot be written: {cause}") from error


def _is_device(path: Path) -> bool:
    """Return whether a path is a pipe or a device, which must not be replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()
