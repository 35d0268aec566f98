"""What cannot be done block by block, refused before any work."""

from __future__ import annotations

from pathlib import Path

from tnlm.calibration.generated import is_self
from tnlm.compression.choices import Asked
from tnlm.compression.request import Request
from tnlm.errors import CheckpointError, OptionError
from tnlm.metrics.measure import FISHER, GRADIENTS, INPUTS


def check_request(request: Request, asked: Asked) -> None:
    """Raise `OptionError` if a request needs the whole model in memory."""
    if request.trains:
        raise OptionError(
            f"recover={request.recover!r} with metric={request.measure.name!r} trains the whole "
            "model, which is on disk here; compress first, and train the loaded result",
            argument=("recover", "metric"),
        )
    left = request.needs - {INPUTS, GRADIENTS, FISHER}
    if left:
        raise OptionError(
            f"metric={request.measure.name!r} needs {', '.join(sorted(left))}, gathered from the "
            "whole model in memory; compress in memory, or take another metric",
            argument="metric",
        )
    if request.refines and request.cascade == "none":
        raise OptionError(
            "blocks are not refined after all fits from files to files; compress in memory, refine "
            "in a cascade, block by block (cascade='sequential' or 'anchored'), or give refine=0",
            argument=("refine", "refine_passes", "cascade"),
        )
    if is_self(asked.calibration.data):
        raise OptionError(
            "calibration='self' reads the whole model for every token that it writes; give text",
            argument="calibration",
        )


def check_source(source: str | Path) -> Path:
    """Return the directory of a model, or raise `CheckpointError`."""
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{source} has no config.json; give the directory of a model with safetensors files"
        )
    return folder
