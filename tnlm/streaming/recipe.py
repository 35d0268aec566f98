"""What the result of a run depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tnlm.calibration.data import fingerprint
from tnlm.compression.choices import Asked
from tnlm.compression.data import windows
from tnlm.compression.request import Request
from tnlm.plans.report import versions
from tnlm.targets.base import Selector


def recipe(
    model: PreTrainedModel,
    files: Iterable[Path],
    request: Request,
    asked: Asked,
    targets: Selector | None,
    ignore: Selector | None,
) -> dict[str, Any]:
    """Return all that the result depends on, as plain values.

    Args:
        model: a skeleton.
        files: that hold its weights, known by name, size and time of change.
        request: what is done.
        asked: the arguments, with the data.
        targets: which matrices are chosen.
        ignore: which are not.
    """
    data = windows(asked.calibration, model) if request.looks_at_data else []
    about = {file: file.stat() for file in sorted(set(files))}
    return {
        "files": {file.name: [one.st_size, one.st_mtime_ns] for file, one in about.items()},
        "config": model.config.to_json_string(),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "scheme": {f.name: repr(getattr(request.scheme, f.name)) for f in _fields(request)},
        **request.record(),
        "targets": repr(targets),
        "ignore": repr(ignore),
        "gradient_samples": asked.calibration.cut.gradient_samples,
        "seed": asked.calibration.cut.seed,
        "data": fingerprint(data),
        "versions": versions(),
    }


def _fields(request: Request) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(request.scheme)
