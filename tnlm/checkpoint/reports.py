"""Finds the report of a compressed model, in memory or beside its files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tnlm.checkpoint.describing import saved_report
from tnlm.checkpoint.sums import REPORT_FILE
from tnlm.checkpoint.transformers_plugin import config_of
from tnlm.plans.report import Report


def known_report(model: nn.Module) -> Report | None:
    """Return the report of a model, or that in the directory it was loaded from, if there is one.

    Raises:
        OptionError: if the file in that directory is not a report.

    Example:
        >>> known_report(nn.Linear(2, 2)) is None
        True
    """
    found = getattr(model, "tnlm_report", None)
    if isinstance(found, Report):
        return found
    source = Path(getattr(model, "name_or_path", "") or "no-directory")
    if config_of(model) is not None and (source / REPORT_FILE).is_file():
        return saved_report(source)
    return None
