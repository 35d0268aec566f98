"""Summarises a compressed model, and reads its report, from its files without weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnlm.checkpoint.configuration import quantization_of
from tnlm.checkpoint.folder import file_of, read_headers
from tnlm.checkpoint.json_file import read_object, shortened
from tnlm.checkpoint.sums import FIELD, REPORT_FILE
from tnlm.errors import CheckpointError, OptionError
from tnlm.plans.report import Report

REPORTED = {
    "parameters_before": int,
    "target_parameters_before": int,
    "target_parameters_after": int,
    "macs_before": int,
    "macs_after": int,
    "metric": str,
}
"""Fields of the report to show, with their types."""


def describe(directory: str | Path) -> dict[str, Any]:
    """Summarise a saved compressed model from its files, without loading weights.

    Raises:
        CheckpointError: if the directory was not written by tnlm, or a file in it is broken.

    Example:
        >>> describe("no-such-model")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such-model has no readable config.json: ...
    """
    folder = Path(directory)
    try:
        config = read_object(file_of(folder, "config.json"))
    except CheckpointError as error:
        raise CheckpointError(f"{directory} has no readable config.json: {error}") from error
    try:
        quantization = quantization_of(config)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    files = [file_of(folder, file.name) for file in sorted(folder.glob("*.safetensors"))]
    sizes = [
        math.prod(stored.shape) for stored in read_headers(files).values() if stored.dtype != "I64"
    ]  # row orders are not parameters
    modules = _field(quantization, "modules", dict)
    return {
        "architecture": _architecture(config),
        "scheme": _field(quantization, "scheme", str | None),
        "options": _field(quantization, "options", dict),
        "format_version": _field(quantization, "format_version", int),
        "modules": dict(sorted(Counter(_formats_of(modules)).items())),
        "parameters": sum(sizes),
        "bytes_on_disk": sum(file.stat().st_size for file in files),
        **_reported(folder),
    }


def saved_report(directory: str | Path) -> Report:
    """Return the report that ``tnlm.save`` wrote beside a model.

    Raises:
        CheckpointError: if there is no such directory, or no report in it, or a damaged one.

    Example:
        >>> saved_report("no-such-model")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such-model: no such directory
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not (folder / REPORT_FILE).exists():
        raise CheckpointError(
            f"{directory} has no {REPORT_FILE}; tnlm.save only writes it for models just compressed"
        )
    stored = read_object(file_of(folder, REPORT_FILE))
    if stored.keys() == {FIELD}:
        raise CheckpointError(
            f"{directory} has no report: its {REPORT_FILE} holds only sums of the files, as it was "
            "saved from a model that was loaded without a report; copy the report of that model's "
            "compression, or compress it again"
        )
    try:
        return Report.from_dict(stored)
    except OptionError as error:
        raise CheckpointError(f"{directory}: {REPORT_FILE} is damaged: {error}") from error


def _field(owner: dict[str, Any], name: str, kind: Any, where: str = "config.json") -> Any:
    value = owner.get(name)
    if name not in owner or not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{where} has a broken field {name!r}: {shortened(value, 60)}")
    return value


def _architecture(config: dict[str, Any]) -> str | None:
    names = config.get("architectures")
    if not names:
        return None
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise CheckpointError(
            f"config.json has a broken field 'architectures': {shortened(names, 60)}"
        )
    return names[0]


def _formats_of(modules: dict[str, Any]) -> Iterator[str]:
    for name, entry in modules.items():
        parts = entry.get("parts", [entry]) if isinstance(entry, dict) else None
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise CheckpointError(f"config.json has a broken entry for {shortened(name, 80)}")
        for part in parts:
            label = part.get("format", part.get("kind", "dense"))
            if not isinstance(label, str):
                raise CheckpointError(f"config.json has a broken entry for {shortened(name, 80)}")
            yield label


def _reported(folder: Path) -> dict[str, Any]:
    """Return the main figures of the report beside the model, if there is one."""
    if not (folder / REPORT_FILE).exists():
        return {}
    report = read_object(file_of(folder, REPORT_FILE))
    if "metric" not in report:  # of a model that was loaded and saved again
        return {}
    return {name: _field(report, name, kind, REPORT_FILE) for name, kind in REPORTED.items()}
