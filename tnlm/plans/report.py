"""The report of a compression: costs, errors and times, per matrix and for the whole model."""

from __future__ import annotations

import functools
import importlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from statistics import fmean
from typing import Any

import torch

from tnlm.errors import OptionError
from tnlm.plans.plan import FORMAT_VERSION, HEADINGS, LayerPlan, Plan, row, table
from tnlm.utils.notebook import fragment

COUNTED = {"params": "parameters", "bytes": "bytes", "macs": "macs", "time": "nanoseconds"}
"""The name in a report of each unit of cost."""
PACKAGES = ("transformers", "tensorly", "numpy")
"""Packages on which results depend, besides tnlm, torch and Python."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages on which results depend.

    Example:
        >>> list(versions())[:3]
        ['python', 'tnlm', 'torch']
    """
    own = importlib.import_module("tnlm").__version__  # the running code may not be installed
    found = {"python": platform.python_version(), "tnlm": own, "torch": str(torch.__version__)}
    return found | {package: _installed(package) for package in PACKAGES}


@functools.cache  # reading the metadata takes longer than fitting a small matrix
def _installed(package: str) -> str:
    return metadata.version(package)


@dataclass(frozen=True)
class Report:
    """The plan as it was carried out, with measured errors and times.

    Attributes:
        plan: decisions and costs; every ``error`` is measured, in the plan's metric.
        seconds: wall time by stage: calibrate, plan, fit.
        tokens: calibration tokens used.
        data: the arguments by which data was drawn; empty if no data was used.
        fingerprint: SHA-256 of the tokens drawn, for calibration and then for training; empty if
            there were none.
        refined: relative errors of each refined block's output on held-out windows, before and
            after; the same where refinement did not lower it, and was undone.
        versions: versions of the software used.
    """

    plan: Plan
    seconds: Mapping[str, float]
    tokens: int = 0
    data: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    refined: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def parameters_before(self) -> int:
        """Parameters of the whole model before, shared ones counted once."""
        return self.plan.model.params

    @property
    def parameters_after(self) -> int:
        """Parameters of the whole model after."""
        return self.plan.model_after.params

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        plan = self.plan
        return {
            "scheme": plan.scheme,
            "metric": plan.metric,
            "request": dict(plan.request),
            "parameters_before": plan.model.params,
            "parameters_after": plan.model_after.params,
            "target_parameters_before": plan.targets_before.params,
            "target_parameters_after": plan.targets_after.params,
            "bytes_before": plan.model.bytes,
            "bytes_after": plan.model_after.bytes,
            "macs_before": plan.model.macs,
            "macs_after": plan.model_after.macs,
            "target_macs_before": plan.targets_before.macs,
            "target_macs_after": plan.targets_after.macs,
            "nanoseconds_before": plan.model.time,
            "nanoseconds_after": plan.model_after.time,
            "target_nanoseconds_before": plan.targets_before.time,
            "target_nanoseconds_after": plan.targets_after.time,
            "seconds": round(sum(self.seconds.values()), 3),
            "seconds_by_stage": {k: round(v, 3) for k, v in self.seconds.items()},
            "calibration_tokens": self.tokens,
            "data": dict(self.data),
            "fingerprint": self.fingerprint,
            "refined": {name: list(errors) for name, errors in self.refined.items()},
            "versions": dict(self.versions),
            "layers": [asdict(layer) for layer in plan.layers],
            "skipped": dict(plan.skipped),
            "coverage": None if plan.coverage is None else asdict(plan.coverage),
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report written by :meth:`to_json`; ``tnlm.save`` keeps it beside a model.

        Raises:
            OptionError: if the text is not such a report.
        """
        try:
            data = json.loads(text)
        except (ValueError, TypeError) as error:
            raise OptionError(f"not a tnlm report: {error!r}") from error
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Read a report from the values of :meth:`to_dict`, as they are after JSON.

        Raises:
            OptionError: if the values are not those of a report.
        """
        try:
            data = {"nanoseconds_before": 0, **values}  # which older reports lack
            plan = {name: data[name] for name in ("scheme", "metric", "request", "skipped")}
            plan |= {"layers": data["layers"], "coverage": data.get("coverage")}
            plan["model"] = {name: data[f"{long}_before"] for name, long in COUNTED.items()}
            read = Plan.from_dict({"format_version": FORMAT_VERSION, **plan})
            found = cls(
                read,
                dict(data["seconds_by_stage"]),
                data["calibration_tokens"],
                data=dict(data.get("data", {})),
                fingerprint=data.get("fingerprint", ""),
                refined=_refined(data.get("refined", {})),
                versions=dict(data.get("versions", {})),
            )
            found.to_json()  # adds up the costs and times, so that a broken one is an error here
            return found
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, OptionError):
                raise
            raise OptionError(f"not a tnlm report: {error!r}") from error

    def summary(self) -> list[str]:
        """Return the totals and times, one line each."""
        times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        return [*self.plan.summary(), *self._gains(), f"time:    {times}"]

    def _gains(self) -> list[str]:
        """Return a line about the refined blocks, if there are any."""
        if not self.refined:
            return []
        kept = sum(after < before for before, after in self.refined.values())
        start = fmean(before for before, _ in self.refined.values())
        end = fmean(after for _, after in self.refined.values())
        blocks = f"{kept} of {len(self.refined)} blocks"
        return [f"refined: {blocks}, mean held-out error {start:.4f} -> {end:.4f}"]

    def __str__(self) -> str:
        """Return the report as a table."""
        return "\n".join([*table(self.plan.layers), *self.plan.left(), *self.summary()])

    def __repr__(self) -> str:
        """Return the scheme and what was kept, in one line."""
        return f"<Report {self.plan.kept()}>"

    def _repr_html_(self) -> str:
        """Return the totals and the table, for a notebook."""
        rows = [HEADINGS, *map(row, self.plan.layers)]
        return fragment(f"Report {self.plan.kept()}", self.summary(), rows)


def _refined(values: Any) -> dict[str, tuple[float, float]]:
    """Return the errors of refined blocks as read from JSON."""
    found = {name: (before, after) for name, (before, after) in dict(values).items()}
    for name, errors in found.items():
        if not all(type(error) in (int, float) for error in errors):
            raise TypeError(f"refined has {errors!r} for {name}, not two errors")
    return found


def with_errors(plan: Plan, errors: Mapping[str, float | None]) -> Plan:
    """Return the plan with measured errors instead of predicted ones."""

    def measured(layer: LayerPlan) -> LayerPlan:
        return replace(layer, error=errors.get(layer.name, layer.error))

    return replace(plan, layers=tuple(measured(layer) for layer in plan.layers))
