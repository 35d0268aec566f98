"""What is drawn of the results of the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from tnlm.errors import OptionError
from tnlm.plans.plan import Plan
from tnlm.plans.report import Report
from tnlm.studies.analysis.result import Analysis
from tnlm.studies.analysis.spectra import Spectrum
from tnlm.studies.analysis.truncation import GroupTruncation
from tnlm.utils.names import place, shortened


def kept_by(label: str, values: Spectrum | Sequence[float]) -> np.ndarray[Any, Any]:
    """Return the share of the energy that the first 0, 1, 2, ... directions hold."""
    if isinstance(values, Spectrum):
        if not values.held:
            raise OptionError(f"spectrum {label!r} has no energy, or is of an earlier version")
        return np.asarray(values.held)
    found = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    if not len(found) or not np.isfinite(found).all() or found[-1] < 0 or found.sum() <= 0:
        raise OptionError(f"spectrum {label!r}: energies must be finite, >= 0, not all zero")
    return np.concatenate([[0.0], np.cumsum(found) / found.sum()])


def by_name(
    values: Mapping[str, float] | Plan | Report | Analysis,
) -> tuple[Mapping[str, float], str]:
    """Return one value per matrix, and what it means."""
    if isinstance(values, Analysis):
        found = {row.name: row.spectrum.ratio90 for row in values.weights}
        return found, "directions for 90 % of the energy"
    if isinstance(values, Plan | Report):
        layers = (values.plan if isinstance(values, Report) else values).layers
        return {layer.name: layer.keep for layer in layers}, "fraction kept"
    return values, ""


def grid_of(
    named: Mapping[str, float],
) -> tuple[np.ndarray[Any, Any], list[str], list[int]]:
    """Return values as a grid: one row per kind of matrix, one column per block; NaN is empty."""
    found = {member: value for name, value in named.items() for member in name.split("+")}
    places = {name: place(name) for name in found}
    kinds = shortened(list(dict.fromkeys(kind for kind, _ in places.values())))
    blocks = sorted({block for _, block in places.values()})
    rows = {kind: row for row, kind in enumerate(kinds)}
    grid = np.full((len(kinds), len(blocks)), np.nan)
    for name, (kind, block) in places.items():
        grid[rows[kind], blocks.index(block)] = found[name]
    return grid, list(kinds.values()), blocks


def by_group(
    reconstruction: GroupTruncation | Sequence[float], scores: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Return one error and one score per group of singular values.

    Raises:
        OptionError: if scores are given beside a result, which has its own.
    """
    if isinstance(reconstruction, GroupTruncation):
        if scores is not None:
            raise OptionError("groups: the result of truncate_groups has scores; leave out scores=")
        rows = reconstruction.rows
        return [row.error for row in rows], [row.value for row in rows]
    given = () if scores is None else scores
    return list(map(float, reconstruction)), list(map(float, given))


def by_block(label: str, found: Analysis) -> dict[int, float]:
    """Return the mean over each block of the directions that its features use.

    Raises:
        OptionError: if nothing was measured on data.
    """
    rows = [row for row in found.features if row.centered and not row.without_top]
    if not rows:
        raise OptionError(f"analysis {label!r} has no features; give calibration= to tnlm.analyze")
    ratios: dict[int, list[float]] = {}
    for row in rows:
        ratios.setdefault(place(row.name)[1], []).append(row.spectrum.ratio90)
    return {block: fmean(values) for block, values in sorted(ratios.items())}
