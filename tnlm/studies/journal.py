"""A journal of finished trials, one JSON line each, so that a killed run loses none."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tnlm.errors import CheckpointError

FORMAT_VERSION = 1
Row = dict[str, Any]


class Journal:
    """Opens or creates a file of finished trials, each under a key.

    Args:
        path: the file, to which one process writes at a time; its folder is created. None keeps
            trials in memory only.
        about: what the trials depend on, as plain JSON values; a file about anything else is
            refused.

    Attributes:
        rows: the finished trials, by key.

    Raises:
        CheckpointError: if the file cannot be written, or is about something else.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "trials.jsonl"
        >>> Journal(path, {"rank": 1}).add("a", {"loss": 2.0})
        >>> Journal(path, {"rank": 1}).rows
        {'a': {'loss': 2.0}}
    """

    def __init__(self, path: str | Path | None, about: Mapping[str, Any]) -> None:
        """Open the file and read its trials."""
        self._path = None if path is None else Path(path)
        self.rows: dict[str, Row] = {}
        if self._path is None:
            return
        header = {"format_version": FORMAT_VERSION, "about": json.loads(json.dumps(about))}
        whole = check_journal(self._path)
        if whole:
            self._read(whole, header)
        else:
            self._write(header)

    def add(self, key: str, row: Row) -> None:
        """Write a finished trial; it is on the disk when this returns.

        Raises:
            CheckpointError: if the file can no longer be written.
        """
        self._write({"key": key, "row": row})
        self.rows[key] = row

    def _read(self, content: bytes, header: Mapping[str, Any]) -> None:
        try:
            first, *lines = [json.loads(line) for line in content.splitlines()]
            self.rows = {line["key"]: line["row"] for line in lines}
            differs = _difference(first, header)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._path} is not a journal of trials: {error!r}") from error
        if differs:
            raise CheckpointError(
                f"{self._path} is the journal of other trials, which differ in {differs}; "
                "use another file, or the same settings"
            )

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error}") from error


def check_journal(path: str | Path) -> bytes:
    """Check that a journal can be written, and return its lines without an incomplete last one.

    Raises:
        CheckpointError: if it cannot be.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):  # a process was killed while writing its last line
                file.truncate(len(whole))
    except OSError as error:
        raise CheckpointError(f"the journal {path} cannot be written: {error}") from error
    return whole


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the names of the settings in which two headers differ."""
    if found["format_version"] != wanted["format_version"]:
        return "format_version"
    old, new = found["about"], wanted["about"]
    return ", ".join(sorted(n for n in {**old, **new} if old.get(n) != new.get(n)))
