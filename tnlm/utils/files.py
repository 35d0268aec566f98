"""Single files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from tnlm.errors import CheckpointError
from tnlm.utils.claim import Claim
from tnlm.utils.undo import attempt


def write_file(path: Path, text: str) -> None:
    """Write a file aside, in UTF-8, and give it its name when it is complete.

    A file that stood there is then replaced; a link to a file stays one.

    Raises:
        OSError: if it cannot be written; what stood there is as it was.

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
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(target)
        claim.drop()

    attempt(work, claim.drop)


def check_names(*paths: Path) -> None:
    """Raise `CheckpointError` for a path that the system cannot even look for.

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
