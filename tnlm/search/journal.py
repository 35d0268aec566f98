"""A file of what was measured, from which a search that was cut off goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tnlm.errors import CheckpointError

FILE = "search.jsonl"
VERSION = 1


class Journal:
    """Keeps measurements by the matrix and the rank that was tried, each on disk at once.

    The first line says what search it is; the others are measurements. A last line that was cut
    off is dropped.

    Args:
        directory: made if it is not there; None keeps measurements in memory alone.

    Raises:
        CheckpointError: if the directory or file cannot be written.

    Example:
        >>> journal = Journal(None)
        >>> journal.add("up_proj", 4, 3.5)
        >>> journal.get("up_proj", 4), journal.get("up_proj", 8)
        (3.5, None)
    """

    def __init__(self, directory: str | Path | None) -> None:
        """See that the file can be written, before any work."""
        self._known: dict[tuple[str, int], float] = {}
        self._file = None if directory is None else Path(directory) / FILE
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab"):
                pass
        except OSError as error:
            raise CheckpointError(f"output_dir={directory} cannot be written: {error}") from error

    def open(self, settings: Mapping[str, Any]) -> None:
        """Read what was measured in this search before, or begin it.

        Raises:
            CheckpointError: if the file is of a search with other settings, or is none.
        """
        if self._file is None:
            return
        wanted = json.loads(json.dumps({"version": VERSION, **settings}))
        lines = self._whole_lines()
        if not lines:
            self._append(wanted)
            return
        before = lines[0]
        changed = sorted(k for k in {**before, **wanted} if before.get(k) != wanted.get(k))
        if changed:
            raise CheckpointError(
                f"{self._file} is of another search, which differs in {', '.join(changed)}; use "
                "the same settings, or another output_dir"
            )
        try:
            self._known = {(row["layer"], row["rank"]): float(row["damage"]) for row in lines[1:]}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._file} is no journal of a search: {error!r}") from error

    def get(self, layer: str, rank: int) -> float | None:
        """Return a measurement if it was made."""
        return self._known.get((layer, rank))

    def add(self, layer: str, rank: int, damage: float) -> None:
        """Keep a measurement."""
        self._known[layer, rank] = damage
        if self._file is not None:
            self._append({"layer": layer, "rank": rank, "damage": damage})

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Return the lines, and cut off a last one that was not finished."""
        if self._file is None:
            return []
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self._file, len(whole))
        try:
            lines = [json.loads(line) for line in whole.decode().splitlines()]
        except ValueError as error:
            raise CheckpointError(f"{self._file} is no journal of a search: {error}") from error
        if not all(isinstance(line, dict) for line in lines):
            raise CheckpointError(f"{self._file} is no journal of a search: not JSON objects")
        return lines

    def _append(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self._file} cannot be written: {error}") from error
