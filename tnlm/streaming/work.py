"""The folder in which a run keeps its finished pieces, so that a killed run can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tnlm.checkpoint.json_file import read_object
from tnlm.errors import CheckpointError
from tnlm.utils.files import write_file
from tnlm.utils.lock import Lock

RECIPE, PLAN, STATISTICS = "recipe.json", "plan.json", "statistics"
"""What the pieces depend on; the plan; and the folder of statistics."""


class Work:
    """The pieces of one output; one process at a time works on them.

    Args:
        out: the output directory.
        scratch: where the folder is; None for beside the output.
        holds: whether this process holds the folder, or uses the one of another process that
            works with it.

    Raises:
        CheckpointError: if another process works on the output, or the folder cannot be made.
    """

    def __init__(self, out: Path, scratch: Path | None, *, holds: bool = True) -> None:
        """Lock the output, and make the folder if it is not there."""
        place = Path(os.path.realpath(out))
        mark = hashlib.blake2b(str(place).encode(), digest_size=4).hexdigest()
        self.folder = (scratch or place.parent) / f".{place.name}-{mark}.tnlm-parts"
        self._agreed, self._holds = False, holds
        self._lock = Lock(place.parent / f".{place.name}.tnlm-lock")
        if not holds:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if not self._lock.take():
                raise CheckpointError(f"{self._lock.holder()} is writing {out}; wait until it ends")
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.folder} cannot be made: {error}; give another scratch=", argument="scratch"
            ) from error

    def agree(self, recipe: Mapping[str, Any]) -> None:
        """Remember what the pieces depend on.

        Raises:
            CheckpointError: if the folder holds pieces of another recipe.
        """
        path = self.folder / RECIPE
        plain = json.loads(json.dumps(recipe))
        if not path.exists():
            write_file(path, json.dumps(plain, indent=1))
        before = read_object(path)
        names = [n for n in {**before, **plain} if before.get(n) != plain.get(n)]
        if names:
            changes = (f"{n} was {_short(before.get(n))}, is {_short(plain.get(n))}" for n in names)
            raise CheckpointError(
                f"{self.folder} holds an unfinished run of another recipe: {'; '.join(changes)}; "
                "finish that run with its arguments, or remove the folder",
            )
        self._agreed = True

    def close(self, *, keep: bool = False) -> None:
        """Unlock the output, and remove the folder.

        Args:
            keep: leave the pieces for the next run.
        """
        if not self._holds:
            return
        empty = not (self.folder / RECIPE).exists()
        if empty or (self._agreed and not keep):  # else they are those of another run
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._lock.path.unlink()
        self._lock.close()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
