"""SHA-256 sums of a checkpoint's files: written beside it, and verified on request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tnlm.checkpoint.folder import file_of
from tnlm.checkpoint.json_file import read_object
from tnlm.errors import CheckpointError

REPORT_FILE = "tnlm_report.json"
FIELD = "sha256"
"""The field of the report that holds the sums, by file name."""
PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index*.json")
"""The files that define the model."""


def record_sums(directory: Path) -> None:
    """Add the sums of a checkpoint's files to its report, and create one if there is none.

    Args:
        directory: a checkpoint with all its other files.
    """
    path = directory / REPORT_FILE
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    report[FIELD] = {file.name: _sum(file) for file in _summed(directory)}
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


def verify(directory: str | Path) -> dict[str, str]:
    """Check the files of a saved model against their SHA-256 sums from when it was saved.

    This detects what no other check can: values that changed on disk, in transit or by hand.

    Args:
        directory: a model written by :func:`tnlm.save`.

    Returns:
        The SHA-256 sum of every file, by name.

    Raises:
        CheckpointError: if a file differs, is missing or extra, or there are no sums.

    Example:
        >>> verify("no-such-model")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such-model is not a directory
    """
    folder = Path(directory)
    try:
        there = folder.is_dir()
    except OSError:  # a name that no directory can have
        there = False
    if not there:
        raise CheckpointError(f"{directory} is not a directory")
    expected = read_sums(folder)
    found = {file.name for file in _summed(folder)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found)]
    problems += [f"{name} is extra" for name in sorted(found - expected.keys())]
    for name in sorted(expected.keys() & found):
        if _sum(file_of(folder, name)) != expected[name]:
            problems.append(f"{name} differs")
    if problems:
        raise CheckpointError(f"{directory} is not what was saved: {'; '.join(problems)}")
    return expected


def read_sums(folder: Path) -> dict[str, str]:
    """Return the sums in a model's report.

    Raises:
        CheckpointError: if there is no report, or it has no sums.
    """
    path = folder / REPORT_FILE
    sums = read_object(file_of(folder, REPORT_FILE)).get(FIELD) if path.exists() else None
    if sums is None:
        raise CheckpointError(
            f"{folder} has no sums to compare with: it was written by save_pretrained or by an "
            "older tnlm; load it and save it again with tnlm.save"
        )
    if not isinstance(sums, dict) or not all(isinstance(one, str) for one in sums.values()):
        raise CheckpointError(f"{path} has a broken field {FIELD!r}")
    return sums


def _summed(folder: Path) -> Iterator[Path]:
    for pattern in PATTERNS:
        yield from sorted(folder.glob(pattern))


def _sum(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
