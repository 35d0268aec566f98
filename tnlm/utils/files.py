"""Single files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

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
