"""Finds the report of a compressed model, in memory or beside its files."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn

from tnlm.checkpoint.json_file import read_object
from tnlm.checkpoint.sums import REPORT_FILE
from tnlm.errors import TnlmError
from tnlm.plans.report import Report

logger = logging.getLogger("tnlm")


def known_report(model: nn.Module) -> Report | None:
    """Return the report that a model got when it was compressed or loaded, if any.

    Example:
        >>> known_report(nn.Linear(2, 2)) is None
        True
    """
    found = getattr(model, "tnlm_report", None)
    return found if isinstance(found, Report) else None


def add_report(model: nn.Module, directory: str | Path | None) -> None:
    """Add the report in a directory to the model that is loaded from it, if there is one.

    A file that holds only sums is no report, and one that cannot be read is left out with a
    warning, since the model does not depend on it.
    """
    path = Path(directory or "no-directory") / REPORT_FILE
    try:
        if not path.is_file():
            return
        stored = read_object(path)
        if "scheme" in stored:
            model.tnlm_report = Report.from_dict(stored)  # type: ignore[assignment]
    except (TnlmError, OSError) as error:
        logger.warning("%s is left out, and not saved with the model again: %s", path, error)
